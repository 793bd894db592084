/* Requests of every kind, of every shape, checked by content against the image itself or a model of it. */
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness.h"

static void write_then_read(const char *directory)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .directory = directory });
    struct blk b = blk_new(&rig, 65536);
    static uint8_t image[65536];

    pattern(b.data, 65536, 7);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 24, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(b.written, 1);
    image_read(&rig, image, sizeof(image), 24 * 512);
    CHECK(is_pattern(image, sizeof(image), 7));
    memset(b.data, 0, 65536);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 24, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(b.written, 65537);
    CHECK(is_pattern(b.data, 65536, 7));
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_WRITE].bytes, 65536);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_FLUSH].count, 1);
    rig_close(&rig);
}

BOTH(what_is_written_is_in_the_image_and_comes_back)
{
    write_then_read(NULL);
}

BOTH(what_is_written_on_tmpfs_is_in_the_image_and_comes_back)
{
    write_then_read("/dev/shm");
}

BOTH(single_sectors_and_odd_buffer_addresses_work)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 8192);
    uint8_t image[512];

    for (uint32_t shift = 1; shift < 600; shift += 37) {
        struct blk odd = b;

        odd.data = b.data + shift;
        pattern(odd.data, 512, shift);
        CHECK_EQUAL(blk_do(&rig.q[0], &odd, VIRTIO_BLK_T_OUT, shift, 512), VIRTIO_BLK_S_OK);
        image_read(&rig, image, 512, shift * 512);
        CHECK(is_pattern(image, 512, shift));
        odd.data = b.data + 2048 + shift * 3;
        CHECK_EQUAL(blk_do(&rig.q[0], &odd, VIRTIO_BLK_T_IN, shift, 512), VIRTIO_BLK_S_OK);
        CHECK(is_pattern(odd.data, 512, shift));
    }
    rig_close(&rig);
}

static void zeroing(const char *directory)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .directory = directory });
    struct blk b = blk_new(&rig, MIB);
    static uint8_t image[MIB];
    struct virtio_blk_discard_write_zeroes *segments = (void *)b.data;

    for (uint32_t unmap = 0; unmap < 2; unmap++) {
        pattern(b.data, MIB, 3);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, MIB), VIRTIO_BLK_S_OK);
        segments[0] = (struct virtio_blk_discard_write_zeroes){ 3, 5, unmap };
        segments[1] = (struct virtio_blk_discard_write_zeroes){ 100, 0, unmap };
        segments[2] = (struct virtio_blk_discard_write_zeroes){ 200, 1500, unmap };
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 48), VIRTIO_BLK_S_OK);
        image_read(&rig, image, MIB, 0);
        pattern(b.data, MIB, 3);
        memset(b.data + 3 * 512, 0, 5 * 512);
        memset(b.data + 200 * 512, 0, 1500 * 512);
        CHECK(!memcmp(b.data, image, MIB));
    }
    segments[0] = (struct virtio_blk_discard_write_zeroes){ 0, 2048, 0 };
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_OK);
    image_read(&rig, image, MIB, 0);
    CHECK(is_byte(image, MIB, 0));

    struct stat stat;
    CHECK(!fstat(rig.image_fd, &stat));
    CHECK_EQUAL(stat.st_size, 4 * MIB);

    /* What is wrong with a segment fails the request and changes nothing. */
    memset(b.data, 0xaa, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_OK);
    segments[0] = (struct virtio_blk_discard_write_zeroes){ 0, 8, 0 };
    segments[1] = (struct virtio_blk_discard_write_zeroes){ 4 * MIB / 512, 1, 0 };
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 32), VIRTIO_BLK_S_IOERR);
    segments[1] = (struct virtio_blk_discard_write_zeroes){ UINT64_MAX, UINT32_MAX, 0 };
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 32), VIRTIO_BLK_S_IOERR);
    segments[0].flags = 1;
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_UNSUPP);
    segments[0].flags = 2;
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), VIRTIO_BLK_S_UNSUPP);
    segments[0].flags = 0;
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 15), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 33 * 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 0), VIRTIO_BLK_S_IOERR);
    image_read(&rig, image, 4096, 0);
    CHECK(is_byte(image, 4096, 0xaa));
    rig_close(&rig);
}

BOTH(discard_and_write_zeroes_leave_zeros_and_nothing_else_changed)
{
    zeroing(NULL);
}

BOTH(write_zeroes_works_where_the_file_system_cannot_zero_ranges)
{
    zeroing("/dev/shm"); /* tmpfs: punches holes, has no FALLOC_FL_ZERO_RANGE */
}

BOTH(discard_is_unsupported_when_it_was_not_negotiated)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .no_start = true });
    struct vd_queue_config config = dqueue_config(&rig.q[0], 0);
    CHECK_EQUAL(vd_queue_start(rig.engine, 0, &config), 0);
    struct blk b = blk_new(&rig, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_UNSUPP);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), VIRTIO_BLK_S_UNSUPP);
    blk_prove(&rig, 0); /* each write stable by itself: there is no FLUSH */
    rig_close(&rig);
}

BOTH(get_id_gives_the_serial_in_as_many_bytes_as_there_are)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);

    memset(b.data, 0x55, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(b.written, 21);
    CHECK(!memcmp(b.data, "serial-of-20-bytes-and-more", 20) && b.data[20] == 0x55);
    memset(b.data, 0x55, 4096);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_GET_ID, 0, 7), VIRTIO_BLK_S_OK);
    CHECK(!memcmp(b.data, "serial-", 7) && b.data[7] == 0x55);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_GET_ID, 0, 4096), VIRTIO_BLK_S_OK);
    CHECK(b.data[20] == 0x55);
    rig_close(&rig);
}

BOTH(unknown_requests_are_unsupported)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 4096);
    static const uint32_t types[] = { 2, 3, 5, 7, 12, 15, 16, 0x80000000u, 0xffffffffu };

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        CHECK_EQUAL(blk_do(&rig.q[0], &b, types[i], 0, 512), VIRTIO_BLK_S_UNSUPP);
    CHECK_EQUAL(rig_stats(&rig, 0).operations[VD_UNSUPPORTED].count, sizeof(types) / sizeof(types[0]));
    blk_prove(&rig, 0);
    rig_close(&rig);
}

BOTH(the_null_backend_answers_everything)
{
    struct rig rig;
    struct vd_backend_info info;

    rig_open(&rig, (struct plan){ .backend = "null", .capacity = 1ull << 50 });
    struct blk b = blk_new(&rig, 65536);
    vd_engine_backend_info(rig.engine, &info);
    CHECK_EQUAL(info.capacity_bytes, 0);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 1ull << 40, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 1ull << 40, 65536), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 16);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_GET_ID, 0, 20), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(the_error_backend_fails_everything_at_once)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .backend = "error", .capacity = MIB });
    struct blk b = blk_new(&rig, 4096);
    memset(b.data, 0, 16);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(rig_stats(&rig, 0).in_flight, 0);
    rig_close(&rig);
}

BOTH(a_buffer_may_cross_from_one_region_into_the_next)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .regions = 2, .iova = 0x10000 });
    struct blk b = blk_new(&rig, 0), back = blk_new(&rig, 0);
    uint8_t *border = rig.driver.base + rig.driver.regions[0].size;

    b.data = border - 1000;
    back.data = border - 4097;
    pattern(b.data, 2048, 5);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 2048), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 2048);
    CHECK_EQUAL(blk_do(&rig.q[0], &back, VIRTIO_BLK_T_IN, 0, 8192), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(back.data, 2048, 5));
    b.header = (void *)(border - 7); /* the header too */
    *back.status = 0;
    struct virtio_blk_outhdr header = { .type = VIRTIO_BLK_T_IN };
    memcpy(border - 7, &header, sizeof(header));
    uint8_t *data = driver_alloc(&rig.driver, 4096, 1);
    struct piece pieces[] = { { driver_iova(&rig.driver, border - 7), 16, false },
                              { driver_iova(&rig.driver, data), 512, true },
                              { driver_iova(&rig.driver, b.status), 1, true } };
    *b.status = 0xff;
    b.done = false;
    CHECK(dqueue_add(&rig.q[0], pieces, 3, &b));
    dqueue_kick(&rig.q[0]);
    CHECK_EQUAL(blk_finish(&rig.q[0], &b), VIRTIO_BLK_S_OK);
    pattern(rig.driver.base, 0, 0);
    uint8_t expected[2048];
    pattern(expected, 2048, 5);
    CHECK(!memcmp(expected, data, 512));
    rig_close(&rig);
}

BOTH(requests_in_one_byte_pieces_work)
{
    for (int indirect = 0; indirect < 2; indirect++) {
        struct rig rig;

        rig_open(&rig, (struct plan){ .size = 1024, .indirect = indirect });
        struct dqueue *q = &rig.q[0];
        uint8_t *memory = driver_alloc(&rig.driver, 4096, 1);
        static struct piece pieces[600];
        struct blk b = { .status = memory + 1500 };
        struct virtio_blk_outhdr header = { .type = VIRTIO_BLK_T_OUT, .sector = 9 };
        uint8_t image[512];

        /* Bytes of the data lie backwards in memory, so that no two pieces are neighbours. */
        for (int round = 0; round < 2; round++) {
            header.type = round ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT;
            memcpy(memory, &header, 16);
            for (uint32_t i = 0; i < 16; i++)
                pieces[i] = (struct piece){ driver_iova(&rig.driver, memory + i), 1, false };
            for (uint32_t i = 0; i < 512; i++) {
                pieces[16 + i] = (struct piece){ driver_iova(&rig.driver, memory + 1100 - i), 1, round };
                memory[1100 - i] = round ? 0 : (uint8_t)(i * 7);
            }
            pieces[528] = (struct piece){ driver_iova(&rig.driver, b.status), 1, true };
            *b.status = 0xff;
            b.done = false;
            CHECK(dqueue_add(q, pieces, 529, &b));
            dqueue_kick(q);
            CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
            image_read(&rig, image, 512, 9 * 512);
            for (uint32_t i = 0; i < 512; i++) {
                CHECK_EQUAL(image[i], (uint8_t)(i * 7));
                CHECK_EQUAL(memory[1100 - i], (uint8_t)(i * 7));
            }
        }
        rig_close(&rig);
    }
}

BOTH(the_status_may_share_a_descriptor_with_data)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 4096);

    b.status = b.data + 1024;
    pattern(b.data, 1024, 21);
    CHECK_EQUAL(blk_do(q, &b, VIRTIO_BLK_T_OUT, 4, 1024), VIRTIO_BLK_S_OK);
    memset(b.data, 0, 1024);
    *b.header = (struct virtio_blk_outhdr){ .type = VIRTIO_BLK_T_IN, .sector = 4 };
    struct piece pieces[] = { { driver_iova(q->d, b.header), 16, false }, { driver_iova(q->d, b.data), 1025, true } };
    *b.status = 0xff;
    b.done = false;
    CHECK(dqueue_add(q, pieces, 2, &b));
    dqueue_kick(q);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(b.written, 1025);
    CHECK(is_pattern(b.data, 1024, 21));
    rig_close(&rig);
}

BOTH(a_write_may_carry_its_header_and_data_in_one_descriptor)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct dqueue *q = &rig.q[0];
    struct blk b = blk_new(&rig, 8192);
    struct virtio_blk_outhdr header = { .type = VIRTIO_BLK_T_OUT, .sector = 1 };
    uint8_t image[1536];

    memcpy(b.data, &header, 16);
    pattern(b.data + 16, 1536, 22);
    struct piece pieces[] = { { driver_iova(q->d, b.data), 16 + 1536, false }, { driver_iova(q->d, b.status), 1, true } };
    CHECK(dqueue_add(q, pieces, 2, &b));
    dqueue_kick(q);
    CHECK_EQUAL(blk_finish(q, &b), VIRTIO_BLK_S_OK);
    image_read(&rig, image, 1536, 512);
    CHECK(is_pattern(image, 1536, 22));
    rig_close(&rig);
}

BOTH(a_transfer_without_data_does_nothing_and_succeeds)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ 0 });
    struct blk b = blk_new(&rig, 512);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(b.written, 1);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 0), VIRTIO_BLK_S_OK);
    rig_close(&rig);
}

BOTH(requests_outside_the_capacity_fail_and_touch_nothing)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .capacity = MIB, .image_bytes = 2 * MIB });
    struct blk b = blk_new(&rig, 8192);
    static const uint64_t sectors[] = { 2048, 2047, 2041, 4000, UINT64_MAX, UINT64_MAX - 7, 1ull << 55, (1ull << 55) - 1,
                                        1ull << 63, UINT64_MAX / 512 };
    static uint8_t image[2 * MIB];

    memset(b.data, 0x77, 8192);
    for (size_t i = 0; i < sizeof(sectors) / sizeof(sectors[0]); i++) {
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, sectors[i], 8192), VIRTIO_BLK_S_IOERR);
        CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, sectors[i], 8192), VIRTIO_BLK_S_IOERR);
    }
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 511), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(rig_stats(&rig, 0).malformed, 2 * sizeof(sectors) / sizeof(sectors[0]) + 1);
    image_read(&rig, image, sizeof(image), 0);
    CHECK(is_byte(image, sizeof(image), 0));
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 2032, 8192), VIRTIO_BLK_S_OK);
    image_read(&rig, image, sizeof(image), 0);
    CHECK(is_byte(image + MIB - 8192, 8192, 0x77) && is_byte(image + MIB, MIB, 0));
    rig_close(&rig);
}

BOTH(a_read_only_device_refuses_to_change_anything)
{
    struct rig rig;

    rig_open(&rig, (struct plan){ .read_only = true });
    struct blk b = blk_new(&rig, 8192);
    uint8_t image[4096];

    pattern(image, 4096, 4);
    CHECK(pwrite(rig.image_fd, image, 4096, 0) == 4096);
    memset(b.data, 0, 16);
    b.data[8] = 8;
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_OUT, 0, 4096), VIRTIO_BLK_S_IOERR);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_FLUSH, 0, 0), VIRTIO_BLK_S_OK);
    CHECK_EQUAL(blk_do(&rig.q[0], &b, VIRTIO_BLK_T_IN, 0, 4096), VIRTIO_BLK_S_OK);
    CHECK(is_pattern(b.data, 4096, 4));
    image_read(&rig, image, 4096, 0);
    CHECK(is_pattern(image, 4096, 4));
    rig_close(&rig);
}
