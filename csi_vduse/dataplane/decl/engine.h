/*
 * The engine's interface, read by the C compiler and by cffi (which knows no preprocessor:
 * declarations only).
 *
 * One engine serves one device. Control calls come from one thread (the worker's control loop);
 * each running queue has a thread of its own. Calls return 0 or a positive result, or -errno.
 */

enum vd_operation {
    VD_READ,
    VD_WRITE,
    VD_FLUSH,
    VD_DISCARD,
    VD_WRITE_ZEROES,
    VD_GET_ID,
    VD_UNSUPPORTED,
    VD_OPERATIONS
};

/* Of histograms; src/histogram.h says what each counts. */
enum { VD_LATENCY_BUCKETS = 217, VD_COUNT_BUCKETS = 11, VD_SERIAL_BYTES = 20 };

/* Why a queue serves no more requests until the driver resets the device. */
enum vd_queue_fault {
    VD_FAULT_NONE,
    VD_FAULT_RING_ADDRESS, /* a ring is not in mapped memory, or misaligned */
    VD_FAULT_AVAIL_INDEX,  /* more entries than the ring holds, or a state that no ring is in */
    VD_FAULT_HEAD,         /* head or buffer id out of range, or in flight already */
    VD_FAULT_CHAIN,        /* descriptors loop, point nowhere, or leave no place for the status */
    VD_FAULT_MEMORY,       /* mapped memory went away under us (SIGBUS) */
    /* the queue's io_uring, or its backend's part of it, could not be set up */
    VD_FAULT_BACKEND,
    VD_FAULT_LOG, /* the in-flight log is not one of this queue */
    VD_FAULTS
};

/* One mapped range: the file behind it is mapped at offset, and its first byte has address iova. */
struct vd_region {
    uint64_t iova;
    uint64_t size;
    uint64_t offset;
    int fd;
    int writable;
};

/* Where an export is, and how to get at it; strings are copied, NULL is empty. */
struct vd_nbd_config {
    const char *host;    /* empty: a unix socket */
    const char *service; /* port */
    const char *socket;
    const char *export_name;
    int tls;
    const char *certificates; /* folder of ca-cert.pem, client-cert.pem, client-key.pem */
    const char *psk_file;     /* instead of certificates */
    const char *psk_identity; /* empty: the file's first */
    const char *tls_hostname; /* empty: host */
    /* FUA with all that changes something, whether the driver can flush or not */
    int write_through;
    /* so many are sent with the same keys at most; 0: as many as AES-GCM is good for */
    uint32_t tls_records;
    /* do not connect at open: the server may be away, and requests wait for it */
    int wait;
    /*
     * sockets and keys come through broker_fd, a SOCK_SEQPACKET socket with vd_nbd_broker behind it
     */
    int brokered;
    int broker_fd;
};

struct vd_config {
    uint32_t max_queues;
    uint32_t queue_size; /* at most; of a backend with rings of its own */
    uint32_t block_size_bytes;
    uint64_t capacity_bytes; /* 0: said later (vd_engine_set_capacity) */
    int read_only;
    int event_fd;        /* eventfd written when a queue faults or a request fails; -1: none */
    const char *serial;  /* answer to GET_ID, cut to 20 bytes */
    const char *backend; /* "file", "nbd", "vhost-user", "null" or "error" */
    const char *path;    /* of the file backend */
    const struct vd_nbd_config *nbd; /* of the NBD backend */
    /* room for 160 bytes: why the backend could not be opened, in words; or NULL */
    char *reason;
    /* for how long one that is full or fails is taken for one that may come back */
    uint32_t away_ms;
};

/* What all queues together may start in a second, counting all requests but FLUSH; 0: no limit. */
struct vd_limits {
    uint64_t requests_per_s;
    uint64_t bytes_per_s; /* of reads and writes */
    /* how long a device that was idle may go without limits' pace: what it saved up */
    uint32_t burst_ms;
};

enum vd_backend_state {
    VD_BACKEND_LOCAL,      /* it has no connections */
    VD_BACKEND_CONNECTED,  /* at last sight */
    VD_BACKEND_CONNECTING, /* lost or not made yet; requests wait */
    VD_BACKEND_REFUSED,    /* a server is there and is not what it should be; requests wait */
    VD_BACKEND_STATES
};

struct vd_backend_status {
    uint32_t state;    /* enum vd_backend_state */
    uint64_t connects; /* connections made */
    uint64_t failures; /* attempts that failed */
    char reason[160];  /* of the state, in words; empty: none */
};

struct vd_backend_info {
    int direct;              /* requests bypass the page cache */
    int discard;             /* DISCARD and WRITE_ZEROES can be offered */
    uint64_t capacity_bytes; /* what the backend holds; 0: any, or not known yet */
    /* with an end that is no whole block of the backend's, and not used; 0: there is none */
    uint64_t said_bytes;
    struct vd_backend_status status;
};

/* What a server says of an export. */
struct vd_nbd_info {
    uint64_t size_bytes; /* of whole blocks */
    uint64_t said_bytes; /* of all of it */
    uint32_t min_block_bytes;
    uint32_t max_payload_bytes;
    uint32_t flags; /* NBD transmission flags */
    int structured;
    int extended;
    int tls_in_kernel;
};

/* Where a queue is and how it speaks to its driver. */
struct vd_queue_config {
    uint64_t features; /* negotiated */
    uint32_t size;
    uint64_t desc_iova;
    uint64_t driver_iova;
    uint64_t device_iova;
    /*
     * Where to begin. Split: the index of the next available entry. Packed: as in a vring base of
     * vhost-user, from bit 0 index and (bit 15) wrap counter of the next available entry, from bit
     * 16 the same of the next used one.
     */
    uint32_t state;
    /*
     * Served before by a process that died. With a log: first serve again what the log says was in
     * flight, in order of submission; then go on where fetching ended. Without: nothing was in
     * flight; fetch on where the used ring ends (split only).
     */
    int resume;
    int paused; /* begin as after a pause: nothing is fetched until it is resumed */
    /* in-flight log, 64-byte aligned, mapped until the queue has stopped; NULL: none */
    void *inflight;
    uint64_t inflight_bytes;
    /* eventfd, only polled; belongs to the caller until the queue has stopped */
    int kick_fd;
    int notify_fd; /* VDUSE device, or eventfd if notify_ioctl is 0 */
    unsigned long notify_ioctl;
};

struct vd_operation_stats {
    uint64_t count;
    uint64_t bytes;
    uint64_t errors;
    uint64_t latency_ns; /* of all of them together */
    uint64_t latency_max_ns;
    uint64_t latency[217];
};

/* Of a backend behind a network. */
struct vd_remote_stats {
    uint64_t commands;   /* answered */
    uint64_t latency_ns; /* from handed to the kernel until answered, all of them together */
    uint64_t latency_max_ns;
    uint64_t latency[217];
    uint64_t sends; /* system calls' worth: each moved many commands */
    uint64_t receives;
    uint64_t received_bytes; /* of payload */
    uint64_t copied_bytes;   /* of that, what had to be copied to where it belongs */
    uint64_t resent;         /* commands sent again after a loss */
    uint64_t losses;         /* of connections */
    uint64_t connected;      /* 1: now */
};

/* Written by the queue's thread alone; survives restarts of the queue. */
struct vd_queue_stats {
    struct vd_operation_stats operations[7];
    uint64_t kicks;
    uint64_t interrupts;
    uint64_t batches; /* requests taken together */
    uint64_t batch_sizes[11];
    uint64_t depths[11]; /* in flight when a batch had been taken */
    uint64_t malformed;
    uint64_t throttled;      /* how often the limits stopped the queue */
    uint64_t throttled_ns;   /* for how long */
    uint64_t data_max_bytes; /* of reads and writes in flight at once, the most there ever were */
    /* CLOCK_MONOTONIC: of what is in flight nothing has been answered since; 0: nothing is */
    uint64_t unanswered_since_ns;
    uint64_t stalled_ns; /* sum of such times that were longer than a second, as they end */
    struct vd_remote_stats remote;
    uint32_t in_flight;
    uint32_t waiting; /* of those, for a backend that is full or away */
    uint32_t fault;   /* enum vd_queue_fault */
    uint32_t running;
};

/* The newest request that failed, or that waits for its backend, for the log. */
struct vd_failure {
    uint64_t count; /* failures since the engine was made */
    uint64_t waits; /* requests that had to wait since then */
    uint64_t offset_bytes;
    uint32_t operation;
    int32_t error; /* positive errno */
};

struct vd_engine;

/* Whether this process may have an io_uring, which all backends but "error" need: 0 or -errno. */
int vd_uring_works(void);
int vd_engine_new(const struct vd_config *config, struct vd_engine **engine);
/* All queues must have stopped. */
void vd_engine_free(struct vd_engine *engine);
/* What a server says of an export; reason has room for 160 bytes. */
int vd_nbd_probe(const struct vd_nbd_config *config, uint32_t timeout_ms, struct vd_nbd_info *info,
                 char *reason);
/*
 * Whether the kernel does TLS, which has it load the module if we may (CAP_NET_ADMIN): a worker in
 * jail, and its broker, may not.
 */
int vd_kernel_has_tls(void);
/*
 * Answer who is at the other end of the socket, with connections to this server and to no other;
 * returns when it is closed.
 */
int vd_nbd_broker(const struct vd_nbd_config *config, int fd);
void vd_engine_backend_info(struct vd_engine *engine, struct vd_backend_info *info);
/* Whether a file is one of the kernel's without a place in any file system. */
int vd_is_anonymous(int fd);
/* Replace the address map; all queues must be stopped or paused. Descriptors stay the caller's. */
int vd_engine_set_regions(struct vd_engine *engine, const struct vd_region *regions,
                          uint32_t count);
int vd_engine_set_capacity(struct vd_engine *engine, uint64_t capacity_bytes);
/* Change the limits, at any time; what waits for the old ones asks again. */
void vd_engine_set_limits(struct vd_engine *engine, const struct vd_limits *limits);
void vd_engine_failure(struct vd_engine *engine, struct vd_failure *failure);
/* Queues that were stopped without waiting and have not ended yet: until then no queue fetches. */
uint32_t vd_engine_abandoned(struct vd_engine *engine);

/*
 * In-flight logs: the size of a queue's, and making one of a queue that the driver has just reset
 * (index 0), which a start with resume then takes for granted. A start without resume does that
 * itself. -EINVAL: too small.
 */
uint64_t vd_inflight_bytes(uint32_t queue_size, int packed);
int vd_inflight_init(void *log, uint64_t bytes, uint32_t queue_size, int packed);

/* -EINVAL also if the log is not one of this queue. */
int vd_queue_start(struct vd_engine *engine, uint32_t index, const struct vd_queue_config *config);
/*
 * Stop fetching, wait for what is in flight, end the thread. Not running is fine. After timeout_ms
 * what is still in flight is abandoned: it ends in the background, its results are dropped, and
 * until then no queue fetches; -ETIMEDOUT. After -ETIMEDOUT replace the address map before the
 * driver may use its memory again: that is what keeps late reads out of it, but for pages that the
 * kernel has pinned for direct I/O already. What was abandoned stays in the in-flight log, which
 * the caller must not unmap then.
 */
int vd_queue_stop(struct vd_engine *engine, uint32_t index, uint32_t timeout_ms);
/* Stop fetching and wait for what is in flight; -ETIMEDOUT leaves the queue paused all the same. */
int vd_queue_pause(struct vd_engine *engine, uint32_t index, uint32_t timeout_ms);
int vd_queue_resume(struct vd_engine *engine, uint32_t index);
/* How far a running or the last stopped queue is, as in vd_queue_config. */
int vd_queue_state(struct vd_engine *engine, uint32_t index, uint32_t *state);
/* Where a latency is counted; for those who read the counts, to know that they and we agree. */
uint32_t vd_latency_bucket_of(uint64_t ns);
void vd_queue_stats_read(struct vd_engine *engine, uint32_t index, struct vd_queue_stats *stats);

/*
 * Interrupts of a device whose rings a vhost-user server works on (src/relay.c): whenever call_fd,
 * an eventfd, is written to, the driver is interrupted as in vd_queue_config. Until it is watched
 * no more; one interrupt that is under way then may still come.
 */
struct vd_relay;
struct vd_relay_queue {
    int call_fd;
    int notify_fd;
    unsigned long notify_ioctl;
};
int vd_relay_new(struct vd_relay **relay);
void vd_relay_free(struct vd_relay *relay);
int vd_relay_watch(struct vd_relay *relay, uint32_t index, const struct vd_relay_queue *queue);
void vd_relay_unwatch(struct vd_relay *relay, int call_fd);
uint64_t vd_relay_interrupts(const struct vd_relay *relay);

/*
 * Of a backend "vhost-user": rings of ours that a server works on, in memory that it has besides
 * the driver's (src/backends/vhost). The region's descriptor stays the backend's.
 */
struct vd_vhost_ring {
    uint32_t size;
    uint64_t desc_iova;
    uint64_t driver_iova;
    uint64_t device_iova;
    int kick_fd;
    int call_fd;
};
void vd_vhost_memory(struct vd_engine *engine, struct vd_region *region);
int vd_vhost_ring(struct vd_engine *engine, uint32_t index, struct vd_vhost_ring *ring);
/*
 * A server, by a number that is not 0, works on a ring from its beginning; or, 0, none does any
 * more. The queue follows: a ring may be given to the next server when vd_vhost_serves says 0.
 */
void vd_vhost_serve(struct vd_engine *engine, uint32_t index, uint32_t server);
uint32_t vd_vhost_serves(struct vd_engine *engine, uint32_t index);
/* Whether a server answered what it was not asked: leave it. */
int vd_vhost_lies(struct vd_engine *engine, uint32_t index);
