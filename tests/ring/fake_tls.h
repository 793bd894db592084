/* The TLS of the server of fake_nbd.h: with a key that both sides know, between the client's socket and one for plain bytes. */
#ifndef RING_FAKE_TLS_H
#define RING_FAKE_TLS_H

#include "fake_nbd.h"

/* The client's configuration: as fake_nbd_config, with TLS and a file of the key, which ends with the process. */
struct vd_nbd_config fake_tls_config(const struct fake_nbd *s);
/*
 * Serve TLS on a connection's socket, by its number, in a thread that owns the socket from now on; returns where the plain
 * bytes are. The thread ends when that is closed.
 */
int fake_tls_start(struct fake_nbd *s, int fd, uint32_t number);
/* Have our kernel's TLS be taken for there, as far as it can be seen without a connection. */
void fake_tls_in_kernel(void);

#endif
