/*
 * Servers count connections, and tell a client that leaves from one that dies. So no more are made than queues need, the same
 * are used for as long as the device lives, and each is ended with a goodbye.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "queue.h"
#include "fake_nbd.h"
#include "nbd_rig.h"

BOTH(nbd_every_connection_is_ended_with_a_goodbye)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .queues = 3 });
    for (uint32_t i = 0; i < 3; i++)
        blk_prove(&rig, i);
    rig_close(&rig);
    WAIT_FOR(!fake_nbd_alive(&s));
    CHECK_EQUAL(load_relaxed(&s.connections), 3);
    CHECK_EQUAL(load_relaxed(&s.goodbyes), 3);
    fake_nbd_close(&s);
}

BOTH(nbd_a_connection_is_ended_with_a_goodbye_in_extended_headers_too)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    s.extended = true;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    blk_prove(&rig, 0);
    rig_close(&rig);
    WAIT_FOR(!fake_nbd_alive(&s));
    CHECK_EQUAL(load_relaxed(&s.goodbyes), 1);
    CHECK_EQUAL(s.violations, 0);
    fake_nbd_close(&s);
}

BOTH(nbd_one_connection_is_enough_for_a_queue_however_often_its_driver_resets)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    s.limit = 1;
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    for (int i = 0; i < 5; i++) {
        blk_prove(&rig, 0);
        rig_stop(&rig, 0);
        dqueue_reset(&rig.q[0], 0);
        CHECK_EQUAL(rig_start(&rig, 0), 0);
    }
    blk_prove(&rig, 0);
    rig_close(&rig);
    CHECK_EQUAL(load_relaxed(&s.connections), 1);
    fake_nbd_close(&s);
}

CASE(nbd_a_connection_that_ended_while_no_queue_had_it_is_not_used)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    blk_prove(&rig, 0);
    rig_stop(&rig, 0);
    fake_nbd_cut(&s, 0);
    WAIT_FOR(!fake_nbd_alive(&s));
    dqueue_reset(&rig.q[0], 0);
    CHECK_EQUAL(rig_start(&rig, 0), 0);
    blk_prove(&rig, 0);
    CHECK_EQUAL(rig_stats(&rig, 0).remote.losses, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_who_asks_what_an_export_is_says_goodbye)
{
    struct vd_nbd_info info;
    struct vd_nbd_config config;
    struct fake_nbd s;
    char reason[160];

    fake_nbd_open(&s, 4 * MIB);
    s.limit = 1;
    config = fake_nbd_config(&s);
    for (uint32_t i = 1; i <= 5; i++) { /* and by then the server has seen him go */
        CHECK_EQUAL(vd_nbd_probe(&config, 1000, &info, reason), 0);
        CHECK_EQUAL(load_relaxed(&s.goodbyes), i);
    }
    fake_nbd_close(&s);
}

CASE(nbd_a_server_that_is_slow_to_forget_one_who_left_takes_the_next)
{
    struct vd_nbd_info info;
    struct vd_nbd_config config;
    struct rig rig;
    struct fake_nbd s;
    char reason[160];

    fake_nbd_open(&s, 4 * MIB);
    s.limit = 1;
    s.forgets_ms = 200;
    config = fake_nbd_config(&s);
    CHECK_EQUAL(vd_nbd_probe(&config, 1000, &info, reason), 0);
    CHECK_EQUAL(vd_nbd_probe(&config, 1000, &info, reason), 0);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64 });
    blk_prove(&rig, 0);
    CHECK_EQUAL(vd_nbd_probe(&config, 1000, &info, reason), -ECONNRESET); /* who does not leave is not waited for */
    CHECK(strstr(reason, "no more clients"));
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_who_is_refused_or_does_not_like_the_export_says_goodbye)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open(&s, 4 * MIB);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .capacity = 8 * MIB });
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ENOSPC);
    WAIT_FOR(load_relaxed(&s.goodbyes) == 1);
    store_relaxed(&s.refuse, true);
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ENOENT);
    WAIT_FOR(load_relaxed(&s.aborts) == 1);
    CHECK_EQUAL(load_relaxed(&s.goodbyes), 1);
    fake_nbd_close(&s);
}

CASE(nbd_who_opens_an_export_to_learn_its_size_needs_no_other_connection)
{
    struct rig rig;
    struct fake_nbd s;
    struct vd_backend_info info;

    fake_nbd_open(&s, 4 * MIB);
    s.limit = 1;
    s.size = 4 * MIB - 100;
    s.min_block = 4096;
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .capacity = 4 * MIB - 4096 });
    rig.config.capacity_bytes = 0;
    nbd_rig_start(&rig);
    vd_engine_backend_info(rig.engine, &info);
    CHECK_EQUAL(info.capacity_bytes, 4 * MIB - 4096);
    CHECK_EQUAL(info.said_bytes, 4 * MIB - 100);
    CHECK_EQUAL(vd_engine_set_capacity(rig.engine, 4 * MIB - 4096), 0);
    blk_prove(&rig, 0);
    rig_close(&rig);
    CHECK_EQUAL(load_relaxed(&s.connections), 1);
    fake_nbd_close(&s);
}
