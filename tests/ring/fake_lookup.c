#include "fake_lookup.h"

#include <netdb.h>
#include <unistd.h>

#include "harness.h"

enum { ADDRESSES_MAX = 4 };

static struct sockaddr_in given[ADDRESSES_MAX];
static uint32_t given_count, given_delay_ms;

void fake_lookup(const struct sockaddr_in *addresses, uint32_t count, uint32_t delay_ms)
{
    CHECK(count <= ADDRESSES_MAX);
    for (uint32_t i = 0; i < count; i++)
        given[i] = addresses[i];
    given_count = count;
    given_delay_ms = delay_ms;
}

static void (*called)(void);

void fake_lookup_calls(void (*first)(void))
{
    called = first;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
    struct addrinfo *first = NULL;

    (void)node;
    (void)service;
    (void)hints;
    usleep(given_delay_ms * 1000);
    if (called)
        called();
    for (uint32_t i = given_count; i-- > 0;) {
        struct addrinfo *each = calloc(1, sizeof(*each));

        *each = (struct addrinfo){ .ai_family = AF_INET, .ai_socktype = SOCK_STREAM, .ai_addrlen = sizeof(given[i]),
                                   .ai_addr = (struct sockaddr *)&given[i], .ai_next = first };
        first = each;
    }
    *result = first;
    return first ? 0 : EAI_AGAIN;
}

void freeaddrinfo(struct addrinfo *first)
{
    while (first) {
        struct addrinfo *next = first->ai_next;

        free(first);
        first = next;
    }
}
