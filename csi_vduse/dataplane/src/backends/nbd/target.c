/*
 * Whom to connect to, in strings of our own: what the caller said may be gone when it is needed
 * again.
 */
#include "target.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static char *copy_text(const char *text)
{
    return strdup(text ? text : "");
}

void nbd_target_free(struct nbd_target *t)
{
    char *strings[] = { t->host,         t->service,  t->socket,       t->export,
                        t->certificates, t->psk_file, t->psk_identity, t->tls_hostname };

    for (size_t i = 0; i < sizeof(strings) / sizeof(strings[0]); i++)
        free(strings[i]);
}

int nbd_target_copy(struct nbd_target *t, const struct vd_nbd_config *c)
{
    *t = (struct nbd_target){
        .host = copy_text(c->host),
        .service = copy_text(c->service),
        .socket = copy_text(c->socket),
        .export = copy_text(c->export_name),
        .tls = c->tls,
        .write_through = c->write_through,
        .tls_records = c->tls_records,
        .certificates = copy_text(c->certificates),
        .psk_file = copy_text(c->psk_file),
        .psk_identity = copy_text(c->psk_identity),
        .tls_hostname = copy_text(c->tls_hostname),
        .broker_fd = c->brokered ? c->broker_fd : -1,
    };
    if (t->host && t->service && t->socket && t->export && t->certificates && t->psk_file &&
        t->psk_identity && t->tls_hostname)
        return 0;
    nbd_target_free(t);
    return -ENOMEM;
}
