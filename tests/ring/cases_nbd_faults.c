/* The NBD backend against a server that goes, comes back, lies, or says nothing. */
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "queue.h"
#include "fake_lookup.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

enum { MANY = 16 };

/* So many reads, each of 8 KiB at a place of its own; the image there has the place's pattern. */
static void send_reads(struct rig *rig, struct fake_nbd *s, struct blk *blks)
{
    fake_nbd_settle(s);
    for (uint32_t i = 0; i < MANY; i++)
        pattern(s->image + i * 65536, 8192, 100 + i);
    fake_nbd_settle(s);
    for (uint32_t i = 0; i < MANY; i++) {
        blks[i] = blk_new(rig, 8192);
        memset(blks[i].data, 0xdd, 8192);
        blk_send(&rig->q[0], &blks[i], VIRTIO_BLK_T_IN, i * 128, 8192);
    }
}

static void check_reads(struct rig *rig, struct blk *blks)
{
    for (uint32_t i = 0; i < MANY; i++) {
        CHECK_EQUAL(blk_finish(&rig->q[0], &blks[i]), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(blks[i].data, 8192, 100 + i));
    }
}

/* The server does something wrong once, in the middle of much work: no request fails, and all data is right. */
static void survives(int misdeed, bool structured, bool extended)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    s.structured = structured;
    s.extended = extended;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128 });
    fake_nbd_misbehave(&s, misdeed, 5);
    send_reads(&rig, &s, blks);
    check_reads(&rig, blks);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 1);
    CHECK(rig_stats(&rig, 0).remote.resent > 0);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_READ].errors, 0);
    WAIT_FOR(nbd_status(&rig).state == VD_BACKEND_CONNECTED);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_a_connection_that_closes_loses_nothing) { survives(CLOSE, true, false); }
CASE(nbd_a_server_killed_in_the_middle_of_an_answer_loses_nothing) { survives(HALF, true, false); }
CASE(nbd_a_server_killed_in_the_middle_of_a_simple_answer_loses_nothing) { survives(HALF, false, false); }
CASE(nbd_garbage_ends_the_connection_and_nothing_else) { survives(BAD_MAGIC, true, false); }
CASE(nbd_an_answer_to_nobody_ends_the_connection_and_nothing_else) { survives(BAD_COOKIE, true, false); }
CASE(nbd_an_answer_given_twice_ends_the_connection_and_nothing_else) { survives(TWICE, false, false); }
CASE(nbd_an_absurd_length_ends_the_connection_and_nothing_else) { survives(ABSURD, true, false); }
CASE(nbd_an_absurd_length_of_an_extended_header_does_no_more) { survives(ABSURD, true, true); }
CASE(nbd_data_outside_of_what_was_asked_for_goes_nowhere) { survives(OUTSIDE, true, false); }
CASE(nbd_more_data_than_was_asked_for_goes_nowhere) { survives(TOO_MUCH, true, false); }
CASE(nbd_an_answer_with_data_missing_is_no_answer) { survives(MISSING, true, false); }
CASE(nbd_a_chunk_of_unknown_type_ends_the_connection_and_nothing_else) { survives(UNKNOWN_TYPE, true, true); }
CASE(nbd_a_server_that_is_shutting_down_fails_no_request) { survives(FAIL_SHUTDOWN, false, false); }

CASE(nbd_a_write_that_is_answered_before_its_data_are_sent_is_not_done)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 2 * MIB);

    pattern(b.data, 2 * MIB, 1);
    fake_nbd_misbehave(&s, EARLY, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 2 * MIB), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK(is_pattern(s.image, 2 * MIB, 1));
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* An error of the server's disk is the driver's to know, and the connection stays. */
static void reports(int misdeed, bool structured, bool extended)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.structured = structured;
    s.extended = extended;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 8192);

    fake_nbd_misbehave(&s, misdeed, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 8192), VIRTIO_BLK_S_IOERR);
    blk_prove(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_an_error_is_reported_with_simple_replies) { reports(FAIL_EIO, false, false); }
CASE(nbd_an_error_is_reported_with_structured_replies) { reports(FAIL_EIO, true, false); }
CASE(nbd_an_error_after_half_of_the_data_is_reported) { reports(FAIL_EIO_WITH_TEXT, true, false); }
CASE(nbd_an_error_is_reported_with_extended_headers) { reports(FAIL_EIO_WITH_TEXT, true, true); }

BOTH(nbd_a_server_that_dies_and_comes_back_again_and_again_loses_nothing)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 256, .event_idx = true });
    for (int round = 0; round < 5; round++) {
        uint32_t connections = load_relaxed(&s.connections);

        store_relaxed(&s.hold, true);
        send_reads(&rig, &s, blks);
        WAIT_FOR(load_relaxed(&s.reads));
        fake_nbd_kill(&s);
        store_relaxed(&s.hold, false);
        store_relaxed(&s.reads, 0);
        WAIT_FOR(nbd_status(&rig).state == VD_BACKEND_CONNECTING);
        fake_nbd_restart(&s);
        check_reads(&rig, blks);
        CHECK_EQUAL(load_relaxed(&s.connections), connections + 1);
    }
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 5);
    rig_close(&rig);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

CASE(nbd_a_server_that_comes_back_smaller_is_refused_until_it_is_right)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 4096);

    fake_nbd_kill(&s);
    store_relaxed(&s.size, 2 * MIB);
    fake_nbd_restart(&s);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096);
    WAIT_FOR(nbd_status(&rig).state == VD_BACKEND_REFUSED);
    CHECK(strstr(nbd_status(&rig).reason, "2097152"));
    store_relaxed(&s.size, 4 * MIB);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    fake_nbd_kill(&s);
    store_relaxed(&s.refuse, true);
    fake_nbd_restart(&s);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096);
    WAIT_FOR(nbd_status(&rig).state == VD_BACKEND_REFUSED);
    CHECK(strstr(nbd_status(&rig).reason, "no export"));
    store_relaxed(&s.refuse, false);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_a_server_that_comes_back_with_other_blocks_is_refused_until_it_is_right)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    s.min_block = 4096;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    struct blk b = blk_new(&rig, 512);

    memset(s.image, 0x77, 4 * MIB);
    fake_nbd_settle(&s);
    store_relaxed(&s.hold, true);
    pattern(b.data, 512, 1);
    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 9, 512);
    WAIT_FOR(load_relaxed(&s.reads));
    fake_nbd_kill(&s);
    store_relaxed(&s.hold, false);
    s.min_block = 8192;
    fake_nbd_restart(&s);
    WAIT_FOR(nbd_status(&rig).state == VD_BACKEND_REFUSED);
    CHECK(strstr(nbd_status(&rig).reason, "8192"));
    fake_nbd_kill(&s);
    s.min_block = 4096;
    fake_nbd_restart(&s);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    fake_nbd_settle(&s);
    CHECK(is_byte(s.image, 9 * 512, 0x77) && is_pattern(s.image + 9 * 512, 512, 1) &&
          is_byte(s.image + 10 * 512, 4 * MIB - 10 * 512, 0x77));
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* Of two addresses of a host the first one says nothing: its queue of connections is full. */
CASE(nbd_an_address_that_is_silent_does_not_keep_us_from_the_next)
{
    struct vd_nbd_config config = { .host = "two.example", .service = "10809", .export_name = "disk" };
    struct sockaddr_in addresses[2];
    int listeners[2], fillers[4];
    struct vd_nbd_info info;
    char reason[160];

    for (int i = 0; i < 2; i++) {
        socklen_t length = sizeof(addresses[i]);

        addresses[i] = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        listeners[i] = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(!bind(listeners[i], (struct sockaddr *)&addresses[i], length) && !listen(listeners[i], i) &&
              !getsockname(listeners[i], (struct sockaddr *)&addresses[i], &length));
    }
    for (int i = 0; i < 4; i++) {
        fillers[i] = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        (void)!connect(fillers[i], (struct sockaddr *)&addresses[0], sizeof(addresses[0]));
    }
    fake_lookup(addresses, 2, 0);
    CHECK_EQUAL(vd_nbd_probe(&config, 1000, &info, reason), -ETIMEDOUT);
    CHECK(strstr(reason, "did not answer")); /* he who listens, and says nothing either */
    for (int i = 0; i < 4; i++)
        close(fillers[i]);
    close(listeners[0]);
    close(listeners[1]);
}

CASE(nbd_a_name_that_is_looked_up_for_long_does_not_hold_up_control)
{
    struct vd_nbd_config config = { .host = "slow.example", .service = "10809", .export_name = "disk", .wait = 1 };
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64 });
    rig.config.nbd = &config;
    fake_lookup(NULL, 0, 7000);
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), 0);
    uint64_t begin = now_ns();
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 4 * MIB), -ETIMEDOUT);
    vd_engine_free(rig.engine);
    CHECK(now_ns() - begin < 6000000000);
    fake_nbd_close(&s);
}

BOTH(nbd_a_server_that_says_nothing_does_not_hold_up_a_stop)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128 });
    store_relaxed(&s.hold, true);
    send_reads(&rig, &s, blks);
    WAIT_FOR(load_relaxed(&s.reads));
    uint64_t begin = now_ns();
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    CHECK(now_ns() - begin < 10000000000);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    WAIT_FOR(!load_acquire(&rig.engine->abandoned)); /* the connection ends, and so do they */
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, rig.driver.region_count), 0);
    for (uint32_t i = 0; i < MANY; i++)
        CHECK(is_byte(blks[i].data, 8192, 0xdd));
    store_relaxed(&s.hold, false);
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_a_server_that_is_away_does_not_hold_up_a_stop_or_the_end)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128 });
    fake_nbd_kill(&s);
    send_reads(&rig, &s, blks);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == MANY);
    CHECK_EQUAL(vd_queue_stop(rig.engine, 0, 100), -ETIMEDOUT);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, NULL, 0), 0);
    WAIT_FOR(!load_acquire(&rig.engine->abandoned));
    uint64_t begin = now_ns();
    vd_engine_free(rig.engine);
    CHECK(now_ns() - begin < 10000000000);
    dqueue_close(&rig.q[0]);
    driver_close(&rig.driver);
    fake_nbd_restart(&s);
    fake_nbd_close(&s);
}

CASE(nbd_a_queue_that_pauses_waits_for_the_server_and_goes_on)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 128 });
    store_relaxed(&s.hold, true);
    send_reads(&rig, &s, blks);
    WAIT_FOR(load_relaxed(&s.reads));
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 50), -ETIMEDOUT);
    fake_nbd_kill(&s);
    store_relaxed(&s.hold, false);
    fake_nbd_restart(&s);
    CHECK_EQUAL(vd_queue_pause(rig.engine, 0, 20000), 0);
    CHECK_EQUAL(vd_queue_resume(rig.engine, 0), 0);
    check_reads(&rig, blks);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_a_device_that_exists_is_served_again_while_its_server_is_away)
{
    struct rig rig;
    struct fake_nbd s;
    struct vd_nbd_config config;

    fake_nbd_open(&s, 4 * MIB);
    fake_nbd_kill(&s);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64 });
    CHECK(vd_engine_new(&rig.config, &rig.engine) < 0);
    config = *rig.config.nbd;
    config.wait = 1;
    rig.config.nbd = &config;
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), 0);
    driver_open(&rig.driver, 8 * MIB, 1, 0x10000, 0);
    CHECK_EQUAL(vd_engine_set_regions(rig.engine, rig.driver.regions, 1), 0);
    dqueue_open(&rig.q[0], &rig.driver, 64, false, false, false);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    struct blk b = blk_new(&rig, 4096);

    blk_send(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096);
    WAIT_FOR(nbd_status(&rig).failures);
    fake_nbd_restart(&s);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    rig_close(&rig);
    fake_nbd_close(&s);
}

/* With each of the queue's requests in flight, the driver makes one more available. */
BOTH(a_chain_more_than_the_ring_has_is_a_fault)
{
    struct rig rig;
    struct fake_nbd s;
    static struct blk blks[MANY];

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = MANY, .indirect = true });
    store_relaxed(&s.hold, true);
    send_reads(&rig, &s, blks);
    WAIT_FOR(rig_stats(&rig, 0).in_flight == MANY);
    if (rig.plan.packed)
        for (uint32_t i = 0; i < MANY; i++) /* a driver that takes its chains back before they are used */
            rig.q[0].ring[i].flags ^= 1 << VRING_PACKED_DESC_F_AVAIL | 1 << VRING_PACKED_DESC_F_USED;
    else
        dqueue_put(&rig.q[0], 0);
    dqueue_kick_always(&rig.q[0]);
    WAIT_FOR(rig_stats(&rig, 0).fault);
    fake_nbd_kill(&s);
    store_relaxed(&s.hold, false);
    fake_nbd_restart(&s);
    rig_close(&rig);
    fake_nbd_close(&s);
}
