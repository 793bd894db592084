/* getaddrinfo as a test wants it; nothing else in the tests' program looks up names. */
#ifndef RING_FAKE_LOOKUP_H
#define RING_FAKE_LOOKUP_H

#include <netinet/in.h>
#include <stdint.h>

/* From now on: whatever is asked, after a while it is these addresses, or EAI_AGAIN if there are none. */
void fake_lookup(const struct sockaddr_in *addresses, uint32_t count, uint32_t delay_ms);

#endif
