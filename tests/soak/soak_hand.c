/* SPDX-License-Identifier: MIT */
/*
 * A process that writes into the others by process_vm_writev(), when they ask it to: the kernel then stores into
 * memory of a process none of whose threads does anything.
 */
#include "soak.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define HANDS (SOAK_PROCESSES * SOAK_HANDS)

/* One message each way; whoever is killed may leave an answer that nobody waits for. */
struct order {
	uint64_t number;
	pid_t pid;
	unsigned count;
	size_t nbytes; /* of each piece */
	void *to[SOAK_PIECES];
	unsigned states[SOAK_PIECES];
};
struct answer {
	uint64_t number;
	int64_t result;
};

static ssize_t write_into(const struct order *order)
{
	struct iovec from[SOAK_PIECES], into[SOAK_PIECES];
	for (unsigned i = 0; i < order->count; i++) {
		from[i] = (struct iovec){soak_patterns[order->states[i]], order->nbytes};
		into[i] = (struct iovec){order->to[i], order->nbytes};
	}
	ssize_t done = process_vm_writev(order->pid, from, order->count, into, order->count, 0);
	return done < 0 ? -errno : done;
}

static void __attribute__((noreturn)) serve(struct pollfd *orders)
{
	struct order order;
	for (;;) {
		if (poll(orders, HANDS, -1) < 0)
			soak_die("poll", errno);
		for (unsigned i = 0; i < HANDS; i++) {
			if (!orders[i].revents || recv(orders[i].fd, &order, sizeof(order), 0) != sizeof(order))
				continue;
			struct answer answer = {order.number, write_into(&order)};
			if (send(orders[i].fd, &answer, sizeof(answer), 0) != sizeof(answer))
				soak_die("send", errno);
		}
	}
}

static bool is_allowed(void)
{
	static char target[SOAK_WORD];
	struct order order = {.pid = getpid(), .count = 1, .nbytes = sizeof(target), .to = {target}, .states = {1}};
	int status;
	pid_t pid = fork();
	if (pid < 0)
		soak_die("fork", errno);
	if (pid == 0)
		_exit(write_into(&order) != sizeof(target));
	return waitpid(pid, &status, 0) == pid && !status && !memcmp(target, soak_patterns[1], sizeof(target));
}

pid_t soak_hand_start(struct soak_options *options)
{
	struct pollfd orders[HANDS];
	soak_hand_allow();
	if (!is_allowed())
		return -1;
	for (unsigned i = 0; i < HANDS; i++) {
		int pair[2];
		if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
			soak_die("socketpair", errno);
		orders[i] = (struct pollfd){.fd = pair[0], .events = POLLIN};
		options->hands[i / SOAK_HANDS][i % SOAK_HANDS] = pair[1];
	}
	pid_t pid = fork();
	if (pid < 0)
		soak_die("fork", errno);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve(orders);
	}
	return pid;
}

void soak_hand_allow(void)
{
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* where Yama asks for it */
}

ssize_t soak_hand_write(int hand, const struct soak_write *write)
{
	static uint32_t orders;
	struct order order = {.pid = getpid(), .count = write->count, .nbytes = write->nbytes};
	struct answer answer = {0};
	for (unsigned i = 0; i < write->count; i++) {
		order.to[i] = write->pieces[i].at;
		order.states[i] = soak_new_state(write, i);
	}
	order.number = (uint64_t)getpid() << 32 | __atomic_add_fetch(&orders, 1, __ATOMIC_RELAXED);
	while (send(hand, &order, sizeof(order), 0) != sizeof(order))
		if (errno != EINTR)
			soak_die("send", errno);
	do {
		if (recv(hand, &answer, sizeof(answer), 0) != sizeof(answer) && errno != EINTR)
			soak_die("recv", errno);
	} while (answer.number != order.number);
	return (ssize_t)answer.result;
}
