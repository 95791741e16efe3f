/* SPDX-License-Identifier: MIT */
/*
 * DOC: The exchange
 *
 * Frames, tables and bitmaps are memory files without names; the only way to them is a descriptor, and the only way
 * to a descriptor is a living peer that passes it over a unix socket (SCM_RIGHTS). Each peer's scanner listens on
 * peer-SLOT in the rendezvous. A request is one message, the answer one message, then the connection ends.
 *
 *    JOIN          ─▶  control, store          what a newcomer needs
 *    BITMAP slot   ─▶  that peer's bitmap      asked of that peer first, then of anybody: a peer may be stopped
 *    WAKE                                      there may be something new
 *
 * EXCH-1. Serving never blocks and holds no lock: a client that says nothing or garbage costs one of a few places for
 *         a few seconds, and a flood of them is answered a few at a time.
 * EXCH-2. Whoever waits for an answer goes on serving, so that two who ask each other both get one.
 * EXCH-3. Only processes of our own user are answered or believed, and what arrives is checked: seals, sizes,
 *         the domain's id.
 * EXCH-4. Asking ends: whoever is silent costs a moment, and all together no more than a time that was set before.
 */
#include "exchange.h"

#include "atomic.h"
#include "error.h"
#include "os.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CLIENT_PATIENCE_NS 3000000000ull
#define DEAF_NS 1000000000ull
#define WELCOME_MOST 64                /* connections at a time */
#define FIRST_PATIENCE_NS 100000000ull /* with each that is asked for the first time */
#define PATIENCE_NS 500000000ull
#define FETCH_ROUNDS 10 /* as long as so many silent peers, and no longer */

static void socket_name(ksm_slotno slot, char name[24])
{
	snprintf(name, 24, "peer-%u", (unsigned)slot);
}

void ksm_exchange_init(struct ksm_exchange *exchange)
{
	memset(exchange, 0, sizeof(*exchange));
	exchange->listener = exchange->own = -1;
	for (size_t i = 0; i < KSM_EXCHANGE_CLIENTS; i++)
		exchange->clients[i].fd = -1;
	for (size_t i = 0; i < KSM_SEEDS; i++)
		exchange->seeds[i] = -1;
}

/* A thread that forks must reach its scanner also when the rendezvous is closed to it, after a change of user. */
static void open_own(struct ksm_exchange *exchange)
{
	uint64_t random[2];
	if (ksm_os_random(random, sizeof(random)))
		return;
	snprintf(exchange->own_name, sizeof(exchange->own_name), "ksmalloc-%016llx%016llx",
		 (unsigned long long)random[0], (unsigned long long)random[1]);
	exchange->own = ksm_os_listen(-1, exchange->own_name);
}

int ksm_exchange_open(struct ksm_exchange *exchange, const struct ksm_peer *peer)
{
	char name[24];
	open_own(exchange);
	socket_name(peer->seat.slot, name);
	ksm_os_unlink(peer->fds.directory, name, false);
	int fd = ksm_os_listen(peer->fds.directory, name);
	if (fd < 0)
		return fd;
	exchange->listener = fd;
	return 0;
}

void ksm_exchange_close(struct ksm_exchange *exchange, const struct ksm_peer *peer, bool unlink)
{
	char name[24];
	for (size_t i = 0; i < KSM_EXCHANGE_CLIENTS; i++)
		ksm_os_close(exchange->clients[i].fd);
	ksm_os_close(exchange->listener);
	ksm_os_close(exchange->own);
	if (unlink && exchange->listener >= 0) {
		socket_name(peer->seat.slot, name);
		ksm_os_unlink(peer->fds.directory, name, false);
	}
	ksm_exchange_init(exchange);
}

/* ---- serving ----------------------------------------------------------------------------------------- */

size_t ksm_exchange_poll_set(const struct ksm_exchange *exchange, struct pollfd *out)
{
	size_t n = 0;
	bool deaf = ksm_os_now_ns() < exchange->deaf_until_ns;
	if (exchange->listener >= 0 && !deaf)
		out[n++] = (struct pollfd){.fd = exchange->listener, .events = POLLIN};
	if (exchange->own >= 0 && !deaf)
		out[n++] = (struct pollfd){.fd = exchange->own, .events = POLLIN};
	for (size_t i = 0; i < KSM_EXCHANGE_CLIENTS; i++)
		if (exchange->clients[i].fd >= 0)
			out[n++] = (struct pollfd){.fd = exchange->clients[i].fd, .events = POLLIN};
	return n;
}

static int bitmap_of(const struct ksm_peer *peer, ksm_slotno slot)
{
	if (slot == peer->seat.slot)
		return peer->seat.bitmap_fd;
	return peer->others[slot].bitmap ? peer->others[slot].fd : -1;
}

static void answer(struct ksm_exchange *exchange, const struct ksm_peer *peer, int fd,
		   const struct ksm_message *request, bool ourselves)
{
	int fds[KSM_OS_FDS_MAX];
	size_t nfds = 0;
	struct ksm_message reply = {
		.magic = KSM_MAGIC, .kind = KSM_MESSAGE_ANSWER, .slot = request->slot, .layout = ksm_layout_hash()};
	memcpy(reply.id, peer->id, sizeof(reply.id));
	if (request->kind == KSM_MESSAGE_WAKE) {
		exchange->woken = true;
		return;
	}
	if (request->layout != reply.layout) {
		reply.status = KSM_ELAYOUT;
	} else if (request->kind == KSM_MESSAGE_JOIN && peer->fds.store >= 0 && peer->fds.control >= 0) {
		fds[nfds++] = peer->fds.control;
		fds[nfds++] = peer->fds.store;
	} else if (request->kind == KSM_MESSAGE_BITMAP && request->slot < KSM_PEERS_MAX) {
		int bitmap = bitmap_of(peer, request->slot);
		if (bitmap >= 0)
			fds[nfds++] = bitmap;
		else
			reply.status = -ENOENT;
	} else if (request->kind == KSM_MESSAGE_SEEDS && ourselves) {
		for (size_t i = 0; i < KSM_SEEDS; i++)
			if (exchange->seeds[i] >= 0)
				fds[nfds++] = exchange->seeds[i];
	} else {
		reply.status = -EINVAL;
	}
	ksm_os_send(fd, &reply, sizeof(reply), fds, nfds); /* if it cannot, the client asks somebody else */
}

/* Returns whether the connection is done with. */
static bool serve_client(struct ksm_exchange *exchange, const struct ksm_peer *peer, int fd)
{
	struct ksm_message request;
	size_t nfds = 0;
	int n = ksm_os_receive(fd, &request, sizeof(request), NULL, &nfds);
	if (n == -EAGAIN)
		return false;
	uid_t uid;
	pid_t pid;
	if (n == (int)sizeof(request) && request.magic == KSM_MAGIC && !ksm_os_peer_uid(fd, &uid, &pid) &&
	    uid == geteuid()) /* EXCH-3 */
		answer(exchange, peer, fd, &request, pid == getpid());
	return true;
}

static void welcome(struct ksm_exchange *exchange, const struct ksm_peer *peer, int listener, uint64_t now)
{
	int fd = -EAGAIN;
	for (unsigned n = 0; n < WELCOME_MOST && (fd = ksm_os_accept(listener)) >= 0; n++) { /* EXCH-1 */
		if (serve_client(exchange, peer, fd)) {
			ksm_os_close(fd);
			continue;
		}
		size_t place = 0;
		for (size_t i = 0; i < KSM_EXCHANGE_CLIENTS; i++) {
			if (exchange->clients[i].fd < 0) {
				place = i;
				break;
			}
			if (exchange->clients[i].since_ns < exchange->clients[place].since_ns)
				place = i;
		}
		ksm_os_close(exchange->clients[place].fd); /* nobody's, or the one who has been silent longest */
		exchange->clients[place].fd = fd;
		exchange->clients[place].since_ns = now;
	}
	if (fd < 0 && fd != -EAGAIN && fd != -ECONNABORTED)
		exchange->deaf_until_ns = now + DEAF_NS; /* EMFILE and the like: who waits would keep us awake */
}

void ksm_exchange_serve(struct ksm_exchange *exchange, const struct ksm_peer *peer)
{
	uint64_t now = ksm_os_now_ns();
	for (size_t i = 0; i < KSM_EXCHANGE_CLIENTS; i++) {
		if (exchange->clients[i].fd < 0)
			continue;
		if (serve_client(exchange, peer, exchange->clients[i].fd) ||
		    now - exchange->clients[i].since_ns > CLIENT_PATIENCE_NS) {
			ksm_os_close(exchange->clients[i].fd);
			exchange->clients[i].fd = -1;
		}
	}
	if (exchange->listener >= 0)
		welcome(exchange, peer, exchange->listener, now);
	if (exchange->own >= 0)
		welcome(exchange, peer, exchange->own, now);
}

/* ---- asking ------------------------------------------------------------------------------------------- */

/*
 * One request to one peer. Returns the number of descriptors in fds, or an error; -EAGAIN: no answer in time.
 * exchange and peer may be NULL: nobody to serve meanwhile (EXCH-2).
 */
static int ask_at(int directory, const char *name, const struct ksm_message *request, int fds[KSM_OS_FDS_MAX],
		  uint64_t deadline, struct ksm_exchange *exchange, const struct ksm_peer *peer)
{
	struct pollfd set[KSM_EXCHANGE_POLL + 1];
	struct ksm_message reply;
	uid_t uid;
	pid_t pid;
	int fd = ksm_os_connect(directory, name);
	if (fd < 0)
		return fd;
	int r = ksm_os_peer_uid(fd, &uid, &pid);
	if (!r && uid != geteuid() && pid != getpid()) /* ours may have begun to listen as somebody else */
		r = KSM_EOWNER;
	if (!r)
		r = ksm_os_send(fd, request, sizeof(*request), NULL, 0);
	while (!r) {
		size_t nfds = KSM_OS_FDS_MAX;
		int n = ksm_os_receive(fd, &reply, sizeof(reply), fds, &nfds);
		if (n != -EAGAIN) {
			bool good = n == (int)sizeof(reply) && reply.magic == KSM_MAGIC &&
				    reply.kind == KSM_MESSAGE_ANSWER && reply.status <= 0; /* a count is ours to make */
			r = n < 0 ? n : !good ? -ECONNRESET : reply.status ? reply.status : (int)nfds;
			if (r != (int)nfds)
				for (size_t i = 0; i < nfds; i++)
					ksm_os_close(fds[i]);
			ksm_os_close(fd);
			return r;
		}
		uint64_t now = ksm_os_now_ns();
		if (now >= deadline) {
			r = -EAGAIN;
			break;
		}
		set[0] = (struct pollfd){.fd = fd, .events = POLLIN};
		size_t count = 1 + (exchange ? ksm_exchange_poll_set(exchange, set + 1) : 0);
		r = ksm_os_poll(set, count, KSM_MIN(deadline - now, 20000000ull));
		r = r < 0 ? r : 0;
		if (exchange)
			ksm_exchange_serve(exchange, peer);
	}
	ksm_os_close(fd);
	return r;
}

static int ask(int directory, ksm_slotno slot, const struct ksm_message *request, int fds[KSM_OS_FDS_MAX],
	       uint64_t deadline, struct ksm_exchange *exchange, const struct ksm_peer *peer)
{
	char name[24];
	socket_name(slot, name);
	return ask_at(directory, name, request, fds, deadline, exchange, peer);
}

int ksm_exchange_join(int directory, int file, uint32_t timeout_ms, int *control, int *store)
{
	struct ksm_message request = {.magic = KSM_MAGIC, .kind = KSM_MESSAGE_JOIN, .layout = ksm_layout_hash()};
	uint64_t now = ksm_os_now_ns(), deadline = now + timeout_ms * 1000000ull;
	uint64_t patience = FIRST_PATIENCE_NS;
	int r = KSM_ENOPEER;
	do {
		for (uint64_t from = 0; from < KSM_PEERS_MAX && now < deadline; now = ksm_os_now_ns()) {
			int64_t at = ksm_os_lock_find(file, KSM_LOCK_LIVENESS + from, KSM_PEERS_MAX - from);
			if (at < 0)
				break;
			ksm_slotno slot = (ksm_slotno)((uint64_t)at - KSM_LOCK_LIVENESS);
			from = slot + 1u;
			int fds[KSM_OS_FDS_MAX];
			int n = ask(directory, slot, &request, fds, ksm_os_now_ns() + patience, NULL, NULL);
			if (n == 2) {
				*control = fds[0];
				*store = fds[1];
				return 0;
			}
			for (int i = 0; i < n; i++)
				ksm_os_close(fds[i]);
			if (n == KSM_ELAYOUT)
				return n;
		}
		if (ksm_os_lock_find(file, KSM_LOCK_LIVENESS, KSM_PEERS_MAX) == -ENOENT)
			return -EAGAIN; /* the last one left meanwhile */
		ksm_os_sleep_ns(2000000);
		patience = PATIENCE_NS;
		now = ksm_os_now_ns();
	} while (now < deadline);
	return r;
}

int ksm_exchange_fetch_bitmap(struct ksm_exchange *exchange, struct ksm_peer *peer, ksm_slotno slot,
			      uint32_t timeout_ms)
{
	struct ksm_message request = {
		.magic = KSM_MAGIC, .kind = KSM_MESSAGE_BITMAP, .slot = slot, .layout = ksm_layout_hash()};
	memcpy(request.id, peer->id, sizeof(request.id));
	uint64_t give_up = ksm_os_now_ns() + FETCH_ROUNDS * timeout_ms * 1000000ull; /* EXCH-4 */
	for (size_t i = 0; i <= peer->living_count && ksm_os_now_ns() < give_up; i++) {
		ksm_slotno whom = i == 0 ? slot : peer->living[i - 1];
		if (whom == peer->seat.slot || (i && whom == slot))
			continue;
		int fds[KSM_OS_FDS_MAX];
		uint64_t deadline = ksm_os_now_ns() + timeout_ms * 1000000ull;
		int n = ask(peer->fds.directory, whom, &request, fds, deadline, exchange, peer);
		for (int j = 1; j < n; j++)
			ksm_os_close(fds[j]);
		if (n < 1)
			continue;
		ksm_merge_lock(peer);
		int r = ksm_peer_attach_bitmap(peer, slot, fds[0]);
		bool current = !r && ksm_peer_has_bitmap(peer, slot);
		ksm_merge_unlock(peer);
		if (current)
			return 0;
	}
	return -EAGAIN;
}

int ksm_exchange_seeds(const struct ksm_exchange *exchange, int fds[KSM_OS_FDS_MAX])
{
	struct ksm_message request = {
		.magic = KSM_MAGIC, .kind = KSM_MESSAGE_SEEDS, .slot = KSM_NO_SLOT, .layout = ksm_layout_hash()};
	if (!exchange->own_name[0])
		return -ENOTCONN;
	return ask_at(-1, exchange->own_name, &request, fds, ksm_os_now_ns() + 2000000000ull, NULL, NULL);
}

void ksm_exchange_wake(const struct ksm_peer *peer, ksm_slotno slot)
{
	struct ksm_message message = {
		.magic = KSM_MAGIC, .kind = KSM_MESSAGE_WAKE, .slot = slot, .layout = ksm_layout_hash()};
	char name[24];
	socket_name(slot, name);
	int fd = ksm_os_connect(peer->fds.directory, name);
	if (fd >= 0)
		ksm_os_send(fd, &message, sizeof(message), NULL, 0);
	ksm_os_close(fd);
}
