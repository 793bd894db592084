/*
 * The NBD protocol's numbers and how they lie in memory (NetworkBlockDevice/nbd, doc/proto.md).
 * Everything is big-endian, and nothing is aligned.
 */
#ifndef VD_NBD_WIRE_H
#define VD_NBD_WIRE_H

#include <endian.h>
#include <string.h>

#include "../../common.h"

#define NBD_MAGIC 0x4e42444d41474943ull        /* NBDMAGIC */
#define NBD_OPTION_MAGIC 0x49484156454F5054ull /* IHAVEOPT */
#define NBD_OPTION_REPLY_MAGIC 0x3e889045565a9ull
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu
#define NBD_EXTENDED_REPLY_MAGIC 0x6e8a278cu
#define NBD_REPLY_ERROR (1u << 31) /* of an option */
#define NBD_CHUNK_ERROR (1u << 15)

enum nbd_handshake_flag { NBD_FIXED_NEWSTYLE = 1, NBD_NO_ZEROES = 2 };

enum nbd_option {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_EXTENDED_HEADERS = 11,
};

enum nbd_option_reply { NBD_REP_ACK = 1, NBD_REP_INFO = 3 };

/* Without NBD_REPLY_ERROR. */
enum nbd_option_error {
    NBD_ERR_UNSUP = 1,
    NBD_ERR_POLICY = 2,
    NBD_ERR_INVALID = 3,
    NBD_ERR_PLATFORM = 4,
    NBD_ERR_TLS_REQD = 5,
    NBD_ERR_UNKNOWN = 6,
    NBD_ERR_SHUTDOWN = 7,
    NBD_ERR_BLOCK_SIZE_REQD = 8,
};

enum nbd_info { NBD_INFO_EXPORT = 0, NBD_INFO_BLOCK_SIZE = 3 };

/* Of an export. */
enum nbd_flag {
    NBD_FLAG_HAS_FLAGS = 1 << 0,
    NBD_FLAG_READ_ONLY = 1 << 1,
    NBD_FLAG_FLUSH = 1 << 2,
    NBD_FLAG_FUA = 1 << 3,
    NBD_FLAG_TRIM = 1 << 5,
    NBD_FLAG_WRITE_ZEROES = 1 << 6,
    NBD_FLAG_DF = 1 << 7,
    NBD_FLAG_MULTI_CONN = 1 << 8,
};

enum nbd_command {
    NBD_READ = 0,
    NBD_WRITE = 1,
    NBD_DISCONNECT = 2,
    NBD_FLUSH = 3,
    NBD_TRIM = 4,
    NBD_WRITE_ZEROES = 6
};

enum nbd_command_flag {
    NBD_CMD_FUA = 1,
    NBD_CMD_NO_HOLE = 2,
    NBD_CMD_DF = 4,
    NBD_CMD_PAYLOAD_LENGTH = 32
};

enum nbd_chunk { NBD_CHUNK_NONE = 0, NBD_CHUNK_DATA = 1, NBD_CHUNK_HOLE = 2 };

enum { NBD_CHUNK_DONE = 1 };

enum {
    NBD_OPTION_BYTES = 16,
    NBD_REQUEST_BYTES = 28,
    NBD_EXTENDED_REQUEST_BYTES = 32,
    NBD_SIMPLE_BYTES = 16,
    NBD_STRUCTURED_BYTES = 20,
    NBD_EXTENDED_BYTES = 32,
    NBD_HEADER_MAX = 48, /* of a reply: an extended one of a hole, with offset and length, is 44 */
};

static inline uint16_t get16(const uint8_t *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof(v));
    return be16toh(v);
}

static inline uint32_t get32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof(v));
    return be32toh(v);
}

static inline uint64_t get64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof(v));
    return be64toh(v);
}

static inline void put16(uint8_t *p, uint16_t v)
{
    v = htobe16(v);
    memcpy(p, &v, sizeof(v));
}

static inline void put32(uint8_t *p, uint32_t v)
{
    v = htobe32(v);
    memcpy(p, &v, sizeof(v));
}

static inline void put64(uint8_t *p, uint64_t v)
{
    v = htobe64(v);
    memcpy(p, &v, sizeof(v));
}

#endif
