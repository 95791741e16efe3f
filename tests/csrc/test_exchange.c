/* SPDX-License-Identifier: MIT */
/* Descriptors and wakes over sockets: who is answered what (EXCH-1 to 3). */
#include "members.h"

static struct ksm_message message(const struct ksm_member *to, uint32_t kind, uint32_t slot)
{
	struct ksm_message message = {.magic = KSM_MAGIC, .kind = kind, .slot = slot, .layout = ksm_layout_hash()};
	memcpy(message.id, to->peer.control->id, sizeof(message.id));
	return message;
}

static int connect_to(const struct ksm_member *a)
{
	char name[24];
	snprintf(name, sizeof(name), "peer-%u", (unsigned)a->peer.seat.slot);
	int fd = ksm_os_connect(a->peer.fds.directory, name);
	CHECK_GE(fd, 0);
	return fd;
}

/* The status answered, with how many descriptors; -ENODATA: the connection was closed without an answer. */
static int ask(struct ksm_member *a, const void *request, size_t nbytes, size_t *nfds)
{
	struct ksm_message reply;
	int fds[KSM_OS_FDS_MAX], fd = connect_to(a);
	CHECK_EQ(ksm_os_send(fd, request, nbytes, NULL, 0), 0);
	ksm_exchange_serve(&a->exchange, &a->peer);
	*nfds = KSM_OS_FDS_MAX;
	int n = ksm_os_receive(fd, &reply, sizeof(reply), fds, nfds);
	for (size_t i = 0; i < *nfds; i++)
		close(fds[i]);
	close(fd);
	if (n <= 0)
		return -ENODATA;
	CHECK_EQ(n, sizeof(reply));
	CHECK_EQ(reply.kind, KSM_MESSAGE_ANSWER);
	CHECK(!memcmp(reply.id, a->peer.control->id, sizeof(reply.id)));
	return reply.status;
}

TEST(questions_and_answers)
{
	struct ksm_member *a = members_join("d");
	size_t nfds;
	int files = kit_open_files();
	struct ksm_message m = message(a, KSM_MESSAGE_JOIN, 0);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), 0);
	CHECK_EQ(nfds, 2);
	m = message(a, KSM_MESSAGE_BITMAP, a->peer.seat.slot);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), 0);
	CHECK_EQ(nfds, 1);
	m = message(a, KSM_MESSAGE_BITMAP, 77);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), -ENOENT);
	m = message(a, KSM_MESSAGE_BITMAP, KSM_PEERS_MAX);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), -EINVAL);
	m = message(a, KSM_MESSAGE_BITMAP, UINT32_MAX);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), -EINVAL);
	m = message(a, 99, 0);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), -EINVAL);
	for (uint32_t kind = KSM_MESSAGE_JOIN; kind <= KSM_MESSAGE_BITMAP; kind++) { /* another version's peer */
		m = message(a, kind, a->peer.seat.slot);
		m.layout++;
		CHECK_EQ(ask(a, &m, sizeof(m), &nfds), KSM_ELAYOUT);
		CHECK_EQ(nfds, 0);
	}
	CHECK_EQ(kit_open_files(), files);
	members_leave(a);
}

TEST(seeds_are_for_ourselves)
{
	struct ksm_member *a = members_join("d");
	size_t nfds;
	a->exchange.seeds[0] = a->peer.fds.store;
	struct ksm_message m = message(a, KSM_MESSAGE_SEEDS, a->peer.seat.slot);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), 0);
	CHECK_EQ(nfds, 1);
	pid_t pid = kit_fork();
	if (pid == 0) { /* another process, which asks as politely */
		struct ksm_message reply;
		int fds[KSM_OS_FDS_MAX], fd = connect_to(a);
		CHECK_EQ(ksm_os_send(fd, &m, sizeof(m), NULL, 0), 0);
		for (int n = -EAGAIN; n == -EAGAIN;) {
			nfds = KSM_OS_FDS_MAX;
			n = ksm_os_receive(fd, &reply, sizeof(reply), fds, &nfds);
			kit_sleep_ms(1);
		}
		CHECK_EQ(nfds, 0);
		CHECK_EQ(reply.status, -EINVAL);
		_exit(0);
	}
	members_begin(NULL);
	CHECK_CHILD(pid);
	members_end();
	members_leave(a);
}

TEST(garbage_and_silence_cost_nothing)
{
	struct ksm_member *a = members_join("d");
	size_t nfds;
	char garbage[300];
	int silent[2 * KSM_EXCHANGE_CLIENTS];
	memset(garbage, 0x5a, sizeof(garbage));
	int files = kit_open_files();
	struct ksm_message m = message(a, KSM_MESSAGE_JOIN, 0);
	for (size_t n = 1; n <= sizeof(garbage); n += 13)
		CHECK_EQ(ask(a, garbage, n, &nfds), -ENODATA);
	m.magic++;
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), -ENODATA);
	m.magic--;
	CHECK_EQ(ask(a, &m, sizeof(m) - 1, &nfds), -ENODATA);
	for (size_t i = 0; i < KSM_COUNT(silent); i++) { /* more than there are places */
		silent[i] = connect_to(a);
		ksm_exchange_serve(&a->exchange, &a->peer);
	}
	CHECK_LE(kit_open_files(), files + (int)KSM_COUNT(silent) + KSM_EXCHANGE_CLIENTS);
	CHECK_EQ(ask(a, &m, sizeof(m), &nfds), 0);
	CHECK_EQ(nfds, 2);
	for (size_t i = 0; i < KSM_COUNT(silent); i++)
		close(silent[i]);
	ksm_exchange_serve(&a->exchange, &a->peer);
	CHECK_EQ(kit_open_files(), files);
	/* Descriptors that nobody asked for are closed. */
	int fd = connect_to(a), gifts[3] = {0, 1, 2};
	CHECK_EQ(ksm_os_send(fd, &m, sizeof(m), gifts, 3), 0);
	ksm_exchange_serve(&a->exchange, &a->peer);
	close(fd);
	CHECK_EQ(kit_open_files(), files);
	members_leave(a);
}

TEST(a_wake_is_noted)
{
	struct ksm_member *a = members_join("d"), *b = members_join("d");
	a->exchange.woken = false;
	ksm_exchange_wake(&b->peer, a->peer.seat.slot);
	ksm_exchange_wake(&b->peer, 900); /* nobody there */
	ksm_exchange_serve(&a->exchange, &a->peer);
	CHECK(a->exchange.woken);
	members_leave(a);
	members_leave(b);
}

/* Each asks the other at the same time: both get an answer (EXCH-2). */
static uint32_t known;

static void *know(void *argument)
{
	struct ksm_member *member = argument;
	while (ksm_scan_know_peers(&member->scanner))
		;
	ksm_add_seqcst(&known, 1);
	while (ksm_load_acquire(&known) < 2)
		ksm_exchange_serve(&member->exchange, &member->peer);
	return NULL;
}

TEST(two_who_ask_each_other)
{
	for (int round = 0; round < 10; round++) {
		struct ksm_member *a = members_join("d"), *b = members_join("d");
		pthread_t one, two;
		known = 0;
		CHECK_EQ(pthread_create(&one, NULL, know, a), 0);
		CHECK_EQ(pthread_create(&two, NULL, know, b), 0);
		pthread_join(one, NULL);
		pthread_join(two, NULL);
		CHECK_EQ(a->peer.living_count, 2);
		CHECK_EQ(b->peer.living_count, 2);
		members_leave(a);
		members_leave(b);
	}
}

TEST(nobody_answers)
{
	struct ksm_member *a = members_join("d");
	int control, store;
	int lonely = ksm_os_reopen(a->peer.fds.file, a->peer.fds.directory, "domain");
	double start = harness_now(); /* alive, but not serving */
	CHECK_EQ(ksm_exchange_join(a->peer.fds.directory, lonely, 200, &control, &store), KSM_ENOPEER);
	CHECK_LT(harness_now() - start, 5 * harness_slower());
	members_leave(a);
}
