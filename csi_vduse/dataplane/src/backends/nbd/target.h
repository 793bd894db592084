/* Whom to connect to; see target.c. */
#ifndef VD_NBD_TARGET_H
#define VD_NBD_TARGET_H

#include "../../common.h"
#include "../../engine_api.h"

/* Strings of our own. */
struct nbd_target {
    char *host, *service, *socket, *export;
    bool tls, write_through;
    uint32_t tls_records;
    char *certificates, *psk_file, *psk_identity, *tls_hostname;
    int broker_fd; /* who is asked for sockets; -1: we make our own */
};

/* 0 or -ENOMEM. */
int nbd_target_copy(struct nbd_target *target, const struct vd_nbd_config *config);
void nbd_target_free(struct nbd_target *target);

#endif
