/* SPDX-License-Identifier: MIT */
/*
 * exchange.h: peers hand one another descriptors, through their sockets in the rendezvous. Only the scanner's
 * thread calls anything here (or a joiner that has no scanner yet).
 */
#ifndef KSM_EXCHANGE_H
#define KSM_EXCHANGE_H

#include "os.h"
#include "peer.h"

#define KSM_EXCHANGE_CLIENTS 16
#define KSM_SEEDS 7

struct pollfd;

struct ksm_exchange {
	int listener; /* -1: not listening */
	int own;      /* listens for threads of our own process, under a name that only they know; -1: not */
	char own_name[48];
	struct {
		int fd; /* -1: free */
		uint64_t since_ns;
	} clients[KSM_EXCHANGE_CLIENTS];
	bool woken;             /* somebody sent a wake */
	uint64_t deaf_until_ns; /* no descriptor was to be had: do not listen until then */
	int seeds[KSM_SEEDS];   /* what to hand to a thread of our own process that asks; -1: nothing */
};

/* Most descriptors ksm_exchange_poll_set() can add. */
#define KSM_EXCHANGE_POLL (KSM_EXCHANGE_CLIENTS + 2)

void ksm_exchange_init(struct ksm_exchange *exchange);
/* Bind and listen as the peer's slot (what a dead predecessor left there is removed: we hold the slot's lock). */
int ksm_exchange_open(struct ksm_exchange *exchange, const struct ksm_peer *peer);
/* Stop; `unlink` the name too. */
void ksm_exchange_close(struct ksm_exchange *exchange, const struct ksm_peer *peer, bool unlink);

/* What to poll for; returns how many entries were filled. */
size_t ksm_exchange_poll_set(const struct ksm_exchange *exchange, struct pollfd *out);
/* Answer everybody who is waiting; never blocks. */
void ksm_exchange_serve(struct ksm_exchange *exchange, const struct ksm_peer *peer);

/* Ask a living peer for store and control. Tries every one. KSM_ENOPEER: none answered
 * in time; -EAGAIN: nobody lives there any more; KSM_ELAYOUT. */
int ksm_exchange_join(int directory, int file, uint32_t timeout_ms, int *control, int *store);
/*
 * Get the bitmap of peer->missing and attach it, from itself or from anybody who has it, serving others meanwhile.
 * Takes the merge lock for the attaching only. 0, or -EAGAIN: not now.
 */
int ksm_exchange_fetch_bitmap(struct ksm_exchange *exchange, struct ksm_peer *peer, ksm_slotno slot,
			      uint32_t timeout_ms);
/* From another thread of the process whose scanner serves: its seeds, in order. Returns how many, or an error. */
int ksm_exchange_seeds(const struct ksm_exchange *exchange, int fds[KSM_OS_FDS_MAX]);
/* Shorten the sleep of another peer's scanner. */
void ksm_exchange_wake(const struct ksm_peer *peer, ksm_slotno slot);

#endif
