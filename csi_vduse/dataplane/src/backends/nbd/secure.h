/* What send.c and receive.c call where TLS is done by us, not by the kernel. */
#ifndef VD_NBD_SECURE_H
#define VD_NBD_SECURE_H

#include "nbd.h"

/* Encrypt and send what send_iov has; comes back to itself when there is room again. */
void nbd_secure_send(struct nbd_queue *nq);
void nbd_secure_send_done(struct nbd_queue *nq, int result);

/* Wait for bytes; what arrives is decrypted and fed. */
void nbd_secure_receive(struct nbd_queue *nq);
void nbd_secure_receive_done(struct nbd_queue *nq, int result);

#endif
