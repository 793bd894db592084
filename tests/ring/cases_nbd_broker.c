/* A worker that may make no sockets and open no files: its connections and keys come from the process beside it. */
#include <openssl/ssl.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "nbd_rig.h"

BOTH(nbd_connections_come_from_the_broker_and_are_made_anew_through_it)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .queues = 2, .brokered = true });
    harness_refuse(SYS_socket, EPERM); /* to all that comes to be from here on */
    nbd_rig_start(&rig);
    nbd_exercise(&rig, &s, 3, 1);
    fake_nbd_cut(&s, 0);
    WAIT_FOR(rig_stats(&rig, 0).remote.losses + rig_stats(&rig, 1).remote.losses);
    nbd_exercise(&rig, &s, 3, 2);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].errors, 0);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_tls_works_with_keys_from_the_broker)
{
    struct rig rig;
    struct fake_nbd s;

    signal(SIGPIPE, SIG_IGN); /* as Python has it */
    fake_nbd_open(&s, 4 * MIB);
    s.tls_version = TLS1_3_VERSION;
    fake_nbd_settle(&s);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .brokered = true });
    ((struct vd_nbd_config *)rig.config.nbd)->psk_file = "/nowhere"; /* the broker knows better */
    harness_refuse(SYS_socket, EPERM);
    nbd_rig_start(&rig);
    nbd_exercise(&rig, &s, 3, 3);
    rig_close(&rig);
    fake_nbd_close(&s);
}

CASE(nbd_who_is_gone_at_open_is_told_of_by_the_broker)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    nbd_rig_plan(&rig, &s, (struct plan){ .size = 64, .brokered = true });
    fake_nbd_kill(&s);
    CHECK_EQUAL(vd_engine_new(&rig.config, &rig.engine), -ECONNREFUSED);
    CHECK(strstr(rig.config.reason, "cannot connect: Connection refused"));
    fake_nbd_close(&s);
}

BOTH(nbd_without_its_broker_what_is_connected_goes_on_and_what_is_not_says_so)
{
    struct rig rig;
    struct fake_nbd s;

    fake_nbd_open_tcp(&s, 4 * MIB);
    nbd_rig_open(&rig, &s, (struct plan){ .size = 64, .brokered = true });
    kill(nbd_broker, SIGKILL);
    CHECK(waitpid(nbd_broker, NULL, 0) == nbd_broker);
    nbd_broker = 0;
    blk_prove(&rig, 0);
    fake_nbd_kill(&s);
    fake_nbd_restart(&s);
    WAIT_FOR(strstr(nbd_status(&rig).reason, "asking for a connection"));
    rig_close(&rig);
    fake_nbd_close(&s);
}
