/* The NBD backend through TLS that is done by us: what the kernel does of it is seen on machines whose kernel has it (tests/vm). */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"
#include "fake_lookup.h"
#include "fake_nbd.h"
#include "fake_tls.h"
#include "nbd_rig.h"

static void open_tls(struct fake_nbd *s, int version)
{
    signal(SIGPIPE, SIG_IGN); /* as Python has it */
    fake_nbd_open(s, 4 * MIB);
    s->tls_version = version;
}

static void exercise(int version)
{
    struct rig rig;
    struct fake_nbd s;

    open_tls(&s, version);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128, .event_idx = true });
    nbd_exercise(&rig, &s, 40, 9);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    rig_close(&rig);
    WAIT_FOR(load_relaxed(&s.goodbyes) == 1);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_reads_and_writes_are_right_through_tls_1_2) { exercise(TLS1_2_VERSION); }
BOTH(nbd_reads_and_writes_are_right_through_tls_1_3) { exercise(TLS1_3_VERSION); }

CASE(nbd_a_server_that_changes_its_keys_is_followed)
{
    struct rig rig;
    struct fake_nbd s;

    open_tls(&s, TLS1_3_VERSION);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    for (int i = 0; i < 5; i++) {
        blk_prove(&rig, 0);
        store_relaxed(&s.new_keys, load_relaxed(&s.new_keys) + 1);
        usleep(10000);
    }
    blk_prove(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* As the keys of a real connection are after some hundred GiB. */
BOTH(nbd_a_connection_whose_keys_are_used_up_is_made_anew_and_nothing_is_lost_or_sent_twice)
{
    struct rig rig;
    struct fake_nbd s;
    struct vd_nbd_config config;

    open_tls(&s, TLS1_3_VERSION);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 128, .event_idx = true });
    config = *rig.config.nbd;
    config.tls_records = 100;
    rig.config.nbd = &config;
    nbd_rig_start(&rig);
    nbd_exercise(&rig, &s, 100, 11);
    CHECK(load_relaxed(&s.connections) > 5);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.resent, 0);
    rig_close(&rig);
    WAIT_FOR(load_relaxed(&s.goodbyes) == load_relaxed(&s.connections));
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

static uint8_t the_log[64 * 1024] __attribute__((aligned(64)));

static void leave_an_error(void)
{
    ERR_raise(ERR_LIB_USER, ERR_R_PASSED_INVALID_ARGUMENT);
}

CASE(nbd_errors_that_others_left_in_openssl_are_not_taken_for_ours)
{
    struct rig rig;
    struct fake_nbd s;

    signal(SIGPIPE, SIG_IGN);
    fake_nbd_open_tcp(&s, 4 * MIB);
    s.tls_version = TLS1_3_VERSION;
    fake_lookup_calls(leave_an_error); /* in the thread that connects */
    harness_step = leave_an_error;     /* in the queue's */
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    rig_stop(&rig, 0);
    struct vd_queue_config with_log = dqueue_config(&rig.q[0], ALL_BLK_FEATURES);

    with_log.inflight = the_log;
    with_log.inflight_bytes = sizeof(the_log);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &with_log), 0);
    for (int i = 0; i < 10; i++)
        blk_prove(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    CHECK_EQUAL(load_relaxed(&s.connections), 1);
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* OpenSSL before 3.2 does not give the kernel TLS 1.3, so 1.2 is tried first where the kernel has TLS. */
CASE(nbd_a_server_of_tls_1_3_alone_is_served_whatever_the_kernel_can)
{
    struct rig rig;
    struct fake_nbd s;

    if (OpenSSL_version_num() >= 0x30200000ul)
        harness_skip("OpenSSL gives the kernel all versions");
    signal(SIGPIPE, SIG_IGN);
    fake_nbd_open_tcp(&s, 4 * MIB);
    s.tls_version = TLS1_3_VERSION;
    fake_tls_in_kernel();
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    blk_prove(&rig, 0);
    uint32_t before = load_relaxed(&s.connections);

    fake_nbd_cut(&s, before - 1);
    WAIT_FOR(rig_stats(&rig, 0).remote.losses);
    blk_prove(&rig, 0);
    CHECK_EQUAL(load_relaxed(&s.connections), before + 1); /* and by then we know */
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_zeros_in_the_place_of_memory_that_is_gone_are_not_sent)
{
    struct rig rig;
    struct fake_nbd s;

    open_tls(&s, TLS1_3_VERSION);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 512);
    uint64_t border = rig.driver.size - 4 * MIB;

    blk_prove(&rig, 0);
    fake_nbd_settle(&s);
    memset(s.image, 0x77, 65536);
    fake_nbd_settle(&s);
    b.data = rig.driver.base + border;
    CHECK(!ftruncate(rig.driver.fd, (off_t)border));
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096);
    WAIT_FOR(rig_stats(&rig, 0).fault == VD_FAULT_MEMORY);
    WAIT_FOR(!rig_stats(&rig, 0).in_flight);
    rig_stop(&rig, 0);
    WAIT_FOR(!fake_nbd_alive(&s));
    fake_nbd_settle(&s);
    CHECK(is_byte(s.image, 65536, 0x77));
    rig_close(&rig);
    fake_nbd_close(&s);
}
