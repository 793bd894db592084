/* getaddrinfo as a test wants it; nothing else in the tests' program looks up names. */
#ifndef RING_FAKE_LOOKUP_H
#define RING_FAKE_LOOKUP_H

#include <netinet/in.h>
#include <stdint.h>

/* From now on: whatever is asked, after a while it is these addresses, or EAI_AGAIN if there are none. */
void fake_lookup(const struct sockaddr_in *addresses, uint32_t count, uint32_t delay_ms);
/* Have each look-up call something first, in the thread that looks up. */
void fake_lookup_calls(void (*first)(void));

#endif
