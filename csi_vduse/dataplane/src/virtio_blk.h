/* From a descriptor chain to a checked request; see virtio_blk.c. */
#ifndef VD_VIRTIO_BLK_H
#define VD_VIRTIO_BLK_H

#include "backend.h"
#include "chain.h"

/* The disk that the driver sees. */
struct vd_disk {
    uint64_t capacity_bytes; /* may grow while queues look */
    bool read_only;
    char serial[VD_SERIAL_BYTES];
};

/*
 * What is to become of a request: a backend serves it, or it is answered; perhaps because no driver
 * should send it.
 */
enum vd_verdict { VD_SERVE, VD_ANSWER, VD_MALFORMED };

/*
 * Parse and check a chain, which has a place for the status; features: negotiated. error: the
 * answer, 0 or a positive errno, if it is not to be served.
 */
enum vd_verdict vd_blk_begin(const struct vd_disk *disk, uint64_t features,
                             struct vd_request *request, const struct vd_chain *chain, int *error);

#endif
