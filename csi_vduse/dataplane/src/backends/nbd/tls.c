/*
 * TLS on a fresh connection: certificates of both sides, or a key that both know. OpenSSL does the
 * handshake; from then on the kernel does the rest where it can (kTLS), and the connection is used
 * as if it were plain.
 *
 * OpenSSL gives the kernel the receiving side of TLS 1.3 from its version 3.2 on, that of 1.2
 * always. Where the kernel has TLS and OpenSSL is older, 1.2 with AES-GCM is used, as safe, and
 * without a copy of ours; with servers that do not have it, 1.3.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/tls.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"

enum { PSK_MAX = 256 };

/* What SSL_get_ex_data gives while hands are shaken. */
struct shaking {
    const struct nbd_stream *stream;
    const struct nbd_target *target;
};

/* To read a file of keys from its beginning; NULL if there is none. */
static FILE *open_key(int fd)
{
    int own = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    FILE *file = own < 0 ? NULL : fdopen(own, "r");

    if (file)
        rewind(file);
    else if (own >= 0)
        close(own);
    return file;
}

/*
 * A PSK file's entry: lines of IDENTITY:HEX (psktool(1)). Returns the key's length, 0 if there is
 * none.
 */
static size_t find_psk(int fd, const char *identity, char *name, size_t name_bytes,
                       unsigned char *key)
{
    FILE *file = open_key(fd);
    char line[1024];
    size_t length = 0;

    while (file && !length && fgets(line, sizeof(line), file)) {
        char *colon = strrchr(line, ':');

        if (!colon || line[0] == '#')
            continue;
        *colon = 0;
        if ((identity[0] && strcmp(line, identity)) || strlen(line) >= name_bytes)
            continue;
        snprintf(name, name_bytes, "%s", line);
        colon[1 + strcspn(colon + 1, "\r\n")] = 0;
        if (OPENSSL_hexstr2buf_ex(key, PSK_MAX, &length, colon + 1, 0) != 1)
            length = 0;
    }
    if (file)
        fclose(file);
    OPENSSL_cleanse(line, sizeof(line));
    return length;
}

static unsigned give_psk(SSL *ssl, const char *hint, char *identity, unsigned identity_bytes,
                         unsigned char *key, unsigned key_bytes)
{
    const struct shaking *shaking = SSL_get_ex_data(ssl, 0);
    unsigned char found[PSK_MAX];
    size_t length = find_psk(shaking->stream->keys[0], shaking->target->psk_identity, identity,
                             identity_bytes, found);

    (void)hint;
    if (length > key_bytes)
        length = 0;
    memcpy(key, found, length);
    OPENSSL_cleanse(found, sizeof(found));
    return (unsigned)length;
}

/* The certificates of a file, one after the other; how many were taken, 0 if one cannot be. */
static int each_certificate(int fd, SSL_CTX *context,
                            int (*take)(SSL_CTX *context, X509 *certificate, int number))
{
    FILE *file = open_key(fd);
    X509 *certificate;
    int taken = 0;

    while (file && (certificate = PEM_read_X509(file, NULL, NULL, NULL))) {
        bool good = take(context, certificate, taken) == 1;

        X509_free(certificate);
        taken = good ? taken + 1 : 0;
        if (!good)
            break;
    }
    if (file)
        fclose(file);
    ERR_clear_error(); /* the file's end is one */
    return taken;
}

static int trust(SSL_CTX *context, X509 *certificate, int number)
{
    (void)number;
    return X509_STORE_add_cert(SSL_CTX_get_cert_store(context), certificate);
}

/* The first is ours, and the others lead from it to the CA. */
static int present(SSL_CTX *context, X509 *certificate, int number)
{
    return number ? (int)SSL_CTX_add1_chain_cert(context, certificate)
                  : SSL_CTX_use_certificate(context, certificate);
}

static bool use_key(int fd, SSL_CTX *context)
{
    FILE *file = open_key(fd);
    EVP_PKEY *key = file ? PEM_read_PrivateKey(file, NULL, NULL, NULL) : NULL;
    bool used = key && SSL_CTX_use_PrivateKey(context, key) == 1;

    EVP_PKEY_free(key);
    if (file)
        fclose(file);
    return used;
}

static int load_certificates(SSL_CTX *context, const struct nbd_stream *s, const char *folder,
                             char *reason)
{
    if (!each_certificate(s->keys[0], context, trust)) {
        snprintf(reason, NBD_REASON_BYTES, "%.100s/ca-cert.pem cannot be used as CA certificate",
                 folder);
        return -EINVAL;
    }
    if (s->keys[1] < 0 && s->keys[2] < 0)
        return 0; /* the server may not ask who we are */
    if (!each_certificate(s->keys[1], context, present) || !use_key(s->keys[2], context)) {
        snprintf(reason, NBD_REASON_BYTES, "client certificate and key in %.100s cannot be used",
                 folder);
        return -EINVAL;
    }
    return 0;
}

/* Whether the newest version is left out, for the kernel's sake. */
static bool is_held_back(const struct nbd_stream *s)
{
    return !s->any_tls && OpenSSL_version_num() < 0x30200000ul && s->kernel_has_tls;
}

static int set_up(SSL_CTX *context, const struct nbd_stream *s, const struct nbd_target *target,
                  char *reason)
{
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    if (is_held_back(s))
        SSL_CTX_set_max_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_options(context,
                        SSL_OP_ENABLE_KTLS | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (target->psk_file[0]) {
        SSL_CTX_set_psk_client_callback(context, give_psk);
        SSL_CTX_set_cipher_list(context, "kDHEPSK+AESGCM:kECDHEPSK+CHACHA20:kPSK+AESGCM");
        return 0;
    }
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM");
    return load_certificates(context, s, target->certificates, reason);
}

/* The server must be whom the URI names, unless the keys themselves say who it is. */
static int name_peer(SSL *ssl, const struct nbd_target *target)
{
    const char *name = target->tls_hostname[0] ? target->tls_hostname : target->host;
    X509_VERIFY_PARAM *parameters = SSL_get0_param(ssl);
    char address[64];

    if (target->psk_file[0])
        return 1;
    if (!name[0])
        return SSL_set1_host(ssl, "localhost"); /* behind a unix socket, as libnbd has it */
    /* a zone is ours to know (RFC 6874) */
    snprintf(address, sizeof(address), "%.*s", (int)strcspn(name, "%"), name);
    if (X509_VERIFY_PARAM_set1_ip_asc(parameters, address) == 1)
        return 1;
    return SSL_set_tlsext_host_name(ssl, name) == 1 && SSL_set1_host(ssl, name);
}

int nbd_tls_start(struct nbd_stream *s, const struct nbd_target *target,
                  char reason[NBD_REASON_BYTES])
{
    bool held_back = is_held_back(s), refused = false;
    struct shaking shaking = { s, target };
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    int error = context ? set_up(context, s, target, reason) : -ENOMEM;
    SSL *ssl = error ? NULL : SSL_new(context);

    if (!error && (!ssl || SSL_set_fd(ssl, s->fd) != 1 || SSL_set_ex_data(ssl, 0, &shaking) != 1 ||
                   name_peer(ssl, target) != 1))
        error = -ENOMEM;
    SSL_CTX_free(context); /* the session holds it */
    if (!error) {
        s->ssl = ssl;
        error = nbd_stream_handshake(s);
        (void)SSL_set_ex_data(ssl, 0, NULL);
    }
    if (error) {
        long verified = ssl ? SSL_get_verify_result(ssl) : X509_V_OK;
        unsigned long code = ERR_peek_last_error();

        if (!reason[0])
            snprintf(reason, NBD_REASON_BYTES, "TLS: %.140s",
                     verified != X509_V_OK ? X509_verify_cert_error_string(verified)
                     : code                ? ERR_reason_error_string(code)
                                           : strerror(-error));
        /* by an alert, or by hanging up: GnuTLS */
        refused = held_back && error == -ECONNRESET && verified == X509_V_OK;
        ERR_clear_error();
        s->ssl = NULL;
        SSL_free(ssl);
    }
    return refused ? -EPROTONOSUPPORT : error == -ECONNRESET ? -EACCES : error;
}

bool nbd_tls_is_kernel(SSL *ssl)
{
    return BIO_get_ktls_send(SSL_get_wbio(ssl)) && BIO_get_ktls_recv(SSL_get_rbio(ssl)) &&
           !SSL_pending(ssl);
}

bool nbd_tls_uses_kernel(SSL *ssl)
{
    return BIO_get_ktls_send(SSL_get_wbio(ssl)) || BIO_get_ktls_recv(SSL_get_rbio(ssl));
}

const char *nbd_tls_interruption(int fd, bool *closed)
{
    uint8_t first[64] = { 0 };
    union {
        struct cmsghdr header;
        uint8_t room[CMSG_SPACE(1)];
    } control = { 0 };
    struct iovec iov = { first, sizeof(first) };
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
    };
    bool got = recvmsg(fd, &message, MSG_DONTWAIT) > 0;
    const struct cmsghdr *c = got ? CMSG_FIRSTHDR(&message) : NULL;
    uint8_t type = c && c->cmsg_level == SOL_TLS && c->cmsg_type == TLS_GET_RECORD_TYPE
                       ? *CMSG_DATA(c)
                       : 0;

    *closed = type == SSL3_RT_ALERT;
    if (type == SSL3_RT_HANDSHAKE && first[0] == SSL3_MT_KEY_UPDATE)
        return "the server changes its keys, which needs another connection";
    return *closed ? "the server closed the connection"
                   : "the server said something that is no data";
}
