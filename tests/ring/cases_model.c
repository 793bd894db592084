/* Random requests of every shape, checked against a model of the image. */
#include <string.h>

#include "harness.h"

/* Cut memory that lies in one piece into count pieces at random places. */
static uint32_t cut(uint64_t *seed, struct piece *out, uint64_t iova, uint32_t length, bool write, uint32_t most)
{
    uint32_t count = 0;

    while (length) {
        uint32_t n = count + 1 == most ? length : 1 + (uint32_t)random_below(seed, length);

        out[count++] = (struct piece){ iova, n, write };
        iova += n;
        length -= n;
    }
    return count;
}

struct flight {
    struct blk b;
    struct dqueue *q;
    uint32_t type, first, sectors;
    uint64_t seed;
    bool busy;
};

enum { FLIGHTS = 24, FLIGHT_SECTORS = 64 };

/*
 * Thousands of random requests, many in flight, no two of them on the same sectors unless both read; the model
 * says what each read must bring, and what the image must be in the end.
 */
static void random_load(struct plan plan, uint64_t requests, uint64_t seed)
{
    struct rig rig;
    uint32_t sectors;
    uint8_t *model, *image;
    struct flight *flights = calloc(FLIGHTS, sizeof(*flights));
    uint64_t sent = 0, done = 0;

    plan.memory = 16 * MIB;
    rig_open(&rig, plan);
    sectors = (uint32_t)(rig.plan.capacity / 512);
    model = calloc(1, rig.plan.capacity);
    image = malloc(rig.plan.capacity);
    CHECK(flights && model && image);
    for (int i = 0; i < FLIGHTS; i++)
        flights[i].b = blk_new(&rig, FLIGHT_SECTORS * 512 + 4096);
    while (done < requests) {
        for (int i = 0; i < FLIGHTS && sent < requests; i++) {
            struct flight *f = &flights[i];
            bool clash = f->busy;
            struct piece pieces[80];
            uint32_t count, most = rig.plan.size / 4 > 24 ? 24 : rig.plan.size / 4u;
            uint8_t *data = f->b.data + (random_below(&seed, 3) ? 0 : random_below(&seed, 4096));
            uint32_t kind = (uint32_t)random_below(&seed, 20);

            if (clash)
                continue;
            f->q = &rig.q[random_below(&seed, rig.plan.queues)];
            f->type = kind < 9 ? VIRTIO_BLK_T_IN : kind < 17 ? VIRTIO_BLK_T_OUT : kind == 17 ? VIRTIO_BLK_T_FLUSH
                                                                                         : VIRTIO_BLK_T_WRITE_ZEROES;
            f->sectors = 1 + (uint32_t)random_below(&seed, FLIGHT_SECTORS);
            f->first = (uint32_t)random_below(&seed, sectors - f->sectors + 1);
            if (!random_below(&seed, 3)) { /* aligned: the direct way */
                f->sectors = (f->sectors + 7) / 8 * 8;
                f->first = f->first / 8 * 8 + f->sectors <= sectors ? f->first / 8 * 8 : 0;
                data = f->b.data;
            }
            for (int j = 0; j < FLIGHTS; j++)
                clash |= flights[j].busy && flights[j].first < f->first + f->sectors &&
                         f->first < flights[j].first + flights[j].sectors;
            if (clash)
                continue;
            *f->b.header = (struct virtio_blk_outhdr){ .type = f->type, .sector = f->first };
            *f->b.status = 0xff;
            f->seed = sent;
            count = cut(&seed, pieces, driver_iova(&rig.driver, f->b.header), 16, false, random_below(&seed, 4) ? 1 : 3);
            if (f->type == VIRTIO_BLK_T_OUT)
                pattern(data, f->sectors * 512, f->seed);
            if (f->type == VIRTIO_BLK_T_WRITE_ZEROES) {
                struct virtio_blk_discard_write_zeroes range = { f->first, f->sectors, (uint32_t)random_below(&seed, 2) };

                memcpy(data, &range, 16);
                count += cut(&seed, pieces + count, driver_iova(&rig.driver, data), 16, false, 3);
            } else if (f->type != VIRTIO_BLK_T_FLUSH) {
                count += cut(&seed, pieces + count, driver_iova(&rig.driver, data), f->sectors * 512,
                             f->type == VIRTIO_BLK_T_IN, most);
            }
            pieces[count++] = (struct piece){ driver_iova(&rig.driver, f->b.status), 1, true };
            uint8_t *keep = f->b.data;
            if (!dqueue_add(f->q, pieces, count, f))
                continue;
            f->b.data = keep;
            f->b.done = false;
            f->busy = true;
            f->b.written = (uint32_t)(data - keep); /* where the data is, until it is done */
            sent++;
            if (random_below(&seed, 2))
                dqueue_kick(f->q);
        }
        bool any = false;

        for (uint32_t i = 0; i < rig.plan.queues; i++) {
            struct flight *f;

            dqueue_kick(&rig.q[i]);
            while ((f = dqueue_get(&rig.q[i], NULL))) {
                uint8_t *at = model + f->first * 512ul, *data = f->b.data + f->b.written;

                any = true;
                CHECK_EQUAL(*f->b.status, VIRTIO_BLK_S_OK);
                if (f->type == VIRTIO_BLK_T_IN)
                    CHECK(!memcmp(at, data, f->sectors * 512));
                else if (f->type == VIRTIO_BLK_T_OUT)
                    pattern(at, f->sectors * 512, f->seed);
                else if (f->type == VIRTIO_BLK_T_WRITE_ZEROES)
                    memset(at, 0, f->sectors * 512);
                f->busy = false;
                done++;
            }
        }
        if (!any && rig.plan.queues == 1)
            CHECK(dqueue_wait(&rig.q[0], 20000));
        else if (!any)
            harness_breathe();
    }
    image_read(&rig, image, rig.plan.capacity, 0);
    CHECK(!memcmp(model, image, rig.plan.capacity));
    for (uint32_t i = 0; i < rig.plan.queues; i++)
        CHECK_EQUAL(rig_stats(&rig, i).fault, VD_FAULT_NONE);
    rig_close(&rig);
    free(flights);
    free(model);
    free(image);
}

BOTH(random_requests_match_the_model)
{
    random_load((struct plan){ 0 }, 2000, 11);
}

BOTH(random_requests_match_the_model_on_tmpfs)
{
    random_load((struct plan){ .directory = "/dev/shm" }, 2000, 12);
}

BOTH(random_requests_match_the_model_with_event_indices_and_indirect_tables)
{
    random_load((struct plan){ .event_idx = true, .indirect = true }, 2000, 13);
}

BOTH(random_requests_match_the_model_across_region_borders)
{
    /* Buffers begin in one region and end in the next: the allocations stay inside, the data is shifted. */
    random_load((struct plan){ .regions = 8, .iova = 0xfffff000, .event_idx = true }, 1500, 14);
}

BOTH(random_requests_match_the_model_with_regions_far_apart)
{
    random_load((struct plan){ .regions = 4, .iova = 1ull << 40, .gap = 1ull << 33, .indirect = true }, 1500, 15);
}

BOTH(random_requests_match_the_model_on_four_queues)
{
    random_load((struct plan){ .queues = 4, .size = 256, .event_idx = true, .indirect = true }, 3000, 16);
}

BOTH(random_requests_match_the_model_on_a_tiny_queue)
{
    random_load((struct plan){ .size = 8 }, 1000, 17);
}

BOTH(random_requests_match_the_model_without_flush)
{
    random_load((struct plan){ .no_flush = true, .directory = "/dev/shm" }, 500, 18);
}
