/* SPDX-License-Identifier: MIT */
/*
 * eintr.c: what a stop does to a thread that waits in a system call. For each call a thread sits in it while all
 * threads are held and let go three times; then either the call has returned EINTR, or it goes on waiting and
 * returns what it should when that comes. Prints one line a call: name, tab, "EINTR" or "goes on".
 *
 * docs/stop.md holds the same table; tests/test_eintr.py compares them.
 */
#include "parking.h"

#include <linux/futex.h>
#include <mqueue.h>
#include <pty.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#define LONG_MS 60000 /* a wait that is never over by itself */

struct call {
	const char *name;
	void (*prepare)(void);
	long (*sit)(void); /* negative, and errno; else it has got what it waited for */
	void (*come)(void);
	struct call *next;
};

static struct call *calls, **tail = &calls;

#define CALL(id, title, before, wait, after)                                                                           \
	static void prepare_##id(void)                                                                                 \
	{                                                                                                              \
		before;                                                                                                \
	}                                                                                                              \
	static long sit_##id(void)                                                                                     \
	{                                                                                                              \
		return (wait);                                                                                         \
	}                                                                                                              \
	static void come_##id(void)                                                                                    \
	{                                                                                                              \
		after;                                                                                                 \
	}                                                                                                              \
	__attribute__((constructor)) static void register_##id(void)                                                   \
	{                                                                                                              \
		static struct call one = {title, prepare_##id, sit_##id, come_##id, NULL};                             \
		*tail = &one;                                                                                          \
		tail = &one.next;                                                                                      \
	}

/* ---- what they wait with ------------------------------------------------------------------------------------------ */

static int ends[2], queue;
static char bytes[65536];
static sem_t semaphore;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static uint32_t word;
static pthread_t sitter;
static pid_t child;
static mqd_t messages;
static char path[96];

static struct timespec in_ms(clockid_t clock, int ms)
{
	struct timespec t;
	clock_gettime(clock, &t);
	t.tv_sec += ms / 1000;
	return t;
}

static long error_of(int error)
{
	errno = error;
	return error ? -1 : 0;
}

static void make_pipe(void)
{
	CHECK_SYS(pipe(ends));
}

static void make_full_pipe(void)
{
	make_pipe();
	fcntl(ends[1], F_SETFL, O_NONBLOCK);
	while (write(ends[1], bytes, sizeof(bytes)) > 0)
		;
	fcntl(ends[1], F_SETFL, 0);
}

static void make_sockets(int timeout)
{
	struct timeval t = {LONG_MS / 1000, 0};
	CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
	if (timeout)
		CHECK_SYS(setsockopt(ends[0], SOL_SOCKET, timeout, &t, sizeof(t)));
}

static void make_full_sockets(int timeout)
{
	make_sockets(timeout);
	while (send(ends[0], bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
		;
}

static void drain(int fd)
{
	fcntl(fd, F_SETFL, O_NONBLOCK);
	for (int i = 0; i < 100; i++, ksm_os_sleep_ns(100000))
		while (read(fd, bytes, sizeof(bytes)) > 0)
			;
}

static void put(void)
{
	CHECK_EQ(write(ends[1], "x", 1), 1);
}

static struct sockaddr_un address;

static void make_listener(bool full)
{
	address.sun_family = AF_UNIX;
	snprintf(address.sun_path, sizeof(address.sun_path), "%s/socket", kit_directory());
	unlink(address.sun_path);
	CHECK_SYS(ends[0] = socket(AF_UNIX, SOCK_STREAM, 0));
	CHECK_SYS(bind(ends[0], (void *)&address, sizeof(address)));
	CHECK_SYS(listen(ends[0], 0));
	CHECK_SYS(ends[1] = socket(AF_UNIX, SOCK_STREAM, 0));
	if (full)
		CHECK_SYS(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof(address)));
}

static long join_self(void)
{
	return error_of(pthread_join(sitter, NULL));
}

static void *until_word(void *unused KSM_UNUSED)
{
	while (!ksm_load_acquire(&word))
		kit_sleep_ms(1);
	return NULL;
}

static void make_child(void)
{
	child = kit_fork();
	if (child == 0)
		for (;;)
			pause();
}

static void make_file(void)
{
	static int number;
	snprintf(path, sizeof(path), "%s/file%d", kit_directory(), number++);
	CHECK_SYS(ends[0] = open(path, O_RDWR | O_CREAT, 0600));
	CHECK_SYS(ends[1] = open(path, O_RDWR));
}

static long lock_file(int fd, int command, short type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
	return fcntl(fd, command, &lock);
}

static void make_fifo(void)
{
	snprintf(path, sizeof(path), "%s/fifo", kit_directory());
	unlink(path);
	CHECK_SYS(mkfifo(path, 0600));
}

static void make_messages(void)
{
	struct mq_attr attributes = {.mq_maxmsg = 2, .mq_msgsize = 8};
	mq_unlink("/ksmtest-eintr");
	messages = mq_open("/ksmtest-eintr", O_RDWR | O_CREAT, 0600, &attributes);
	CHECK_SYS(messages);
	mq_unlink("/ksmtest-eintr");
}

static long receive_message(bool timed)
{
	struct timespec t = in_ms(CLOCK_REALTIME, LONG_MS);
	return timed ? mq_timedreceive(messages, bytes, 8, NULL, &t) : mq_receive(messages, bytes, 8, NULL);
}

static void make_epoll(void)
{
	struct epoll_event event = {.events = EPOLLIN};
	make_pipe();
	CHECK_SYS(queue = epoll_create1(0));
	CHECK_SYS(epoll_ctl(queue, EPOLL_CTL_ADD, ends[0], &event));
}

static struct epoll_event events[1];

static long select_on(int fd, bool p)
{
	struct timeval t = {LONG_MS / 1000, 0};
	struct timespec ts = {LONG_MS / 1000, 0};
	fd_set set;
	FD_ZERO(&set);
	FD_SET(fd, &set);
	return p ? pselect(fd + 1, &set, NULL, NULL, &ts, NULL) : select(fd + 1, &set, NULL, NULL, &t);
}

static long poll_on(int fd, bool p, bool timed)
{
	struct pollfd set = {fd, POLLIN, 0};
	struct timespec ts = {LONG_MS / 1000, 0};
	return p ? ppoll(&set, 1, timed ? &ts : NULL, NULL) : poll(&set, 1, timed ? LONG_MS : -1);
}

static long sleep_on(clockid_t clock, int flags)
{
	struct timespec t = {LONG_MS / 1000, 0};
	if (flags)
		t = in_ms(clock, LONG_MS);
	return error_of(clock_nanosleep(clock, flags, &t, NULL));
}

static void make_queue(void)
{
	CHECK_SYS(queue = msgget(IPC_PRIVATE, 0600));
}

static void send_to_queue(void)
{
	struct {
		long type;
		char text[8];
	} message = {1, "hello"};
	CHECK_SYS(msgsnd(queue, &message, 8, 0));
}

static void make_semaphores(void)
{
	CHECK_SYS(queue = semget(IPC_PRIVATE, 1, 0600));
}

static long change_semaphore(short by, bool timed)
{
	struct sembuf change = {0, by, 0};
	struct timespec t = {LONG_MS / 1000, 0};
	return semtimedop(queue, &change, 1, timed ? &t : NULL);
}

static sigset_t wanted(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	return set;
}

static void block_wanted(void)
{
	sigset_t set = wanted();
	pthread_sigmask(SIG_BLOCK, &set, NULL); /* inherited by the thread */
}

static long wait_for_signal(bool timed)
{
	sigset_t set = wanted();
	struct timespec t = {LONG_MS / 1000, 0};
	return timed ? sigtimedwait(&set, NULL, &t) : sigwaitinfo(&set, NULL);
}

static void kick(void)
{
	pthread_kill(sitter, SIGUSR2);
}

static void on_kick(int signal KSM_UNUSED)
{
}

static long futex(bool timed)
{
	struct timespec t = {LONG_MS / 1000, 0};
	return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, timed ? &t : NULL);
}

static void wake_futex(void)
{
	ksm_store_release(&word, 1);
	ksm_os_word_wake_sigsafe(&word, 1);
}

static long wait_on_condition(bool timed)
{
	struct timespec t = in_ms(CLOCK_REALTIME, LONG_MS);
	int r = 0;
	pthread_mutex_lock(&mutex);
	while (!word && !r)
		r = timed ? pthread_cond_timedwait(&condition, &mutex, &t) : pthread_cond_wait(&condition, &mutex);
	pthread_mutex_unlock(&mutex);
	return error_of(r);
}

static void signal_condition(void)
{
	pthread_mutex_lock(&mutex);
	word = 1;
	pthread_cond_signal(&condition);
	pthread_mutex_unlock(&mutex);
}

static long wait_on_semaphore(bool timed)
{
	struct timespec t = in_ms(CLOCK_REALTIME, LONG_MS);
	return timed ? sem_timedwait(&semaphore, &t) : sem_wait(&semaphore);
}

static void make_tty(void)
{
	CHECK_SYS(openpty(&ends[1], &ends[0], NULL, NULL, NULL));
}

static void make_eventfd(void)
{
	CHECK_SYS(ends[0] = ends[1] = eventfd(0, 0));
}

static void make_timer(void)
{
	struct itimerspec t = {.it_value = {LONG_MS / 1000, 0}};
	CHECK_SYS(ends[0] = timerfd_create(CLOCK_MONOTONIC, 0));
	CHECK_SYS(timerfd_settime(ends[0], 0, &t, NULL));
}

static void make_watch(void)
{
	CHECK_SYS(ends[0] = inotify_init());
	CHECK_SYS(inotify_add_watch(ends[0], kit_directory(), IN_CREATE));
	snprintf(path, sizeof(path), "%s/new", kit_directory());
	unlink(path);
}

static void make_signalfd(void)
{
	sigset_t set = wanted();
	block_wanted();
	CHECK_SYS(ends[0] = signalfd(-1, &set, 0));
}

/* ---- the calls ------------------------------------------------------------------------------------------------------ */

#define GET(fd) read(fd, bytes, sizeof(bytes))

CALL(read_pipe, "read: pipe", make_pipe(), GET(ends[0]), put())
CALL(write_pipe, "write: pipe, full", make_full_pipe(), write(ends[1], bytes, 4096), drain(ends[0]))
CALL(read_tty, "read: terminal", make_tty(), GET(ends[0]), CHECK_EQ(write(ends[1], "x\n", 2), 2))
CALL(read_eventfd, "read: eventfd", make_eventfd(), read(ends[0], bytes, 8), CHECK_SYS(eventfd_write(ends[1], 1)))
CALL(read_timerfd, "read: timerfd", make_timer(), GET(ends[0]),
     CHECK_SYS(timerfd_settime(ends[0], 0, &(struct itimerspec){.it_value = {0, 1}}, NULL)))
CALL(read_signalfd, "read: signalfd", make_signalfd(), GET(ends[0]), kick())
CALL(read_inotify, "read: inotify", make_watch(), GET(ends[0]), CHECK_SYS(mkdir(path, 0700)); rmdir(path))
CALL(splice, "splice, sendfile: pipe", make_pipe();
     CHECK_SYS(queue = open("/dev/null", O_WRONLY)), splice(ends[0], NULL, queue, NULL, 1, 0), put())
CALL(recv, "recv, recvfrom, recvmsg", make_sockets(0), recv(ends[0], bytes, 1, 0), put())
CALL(recv_timeo, "recv, recvfrom, recvmsg: with SO_RCVTIMEO", make_sockets(SO_RCVTIMEO), recv(ends[0], bytes, 1, 0),
     put())
CALL(send, "send, sendto, sendmsg", make_full_sockets(0), send(ends[0], bytes, 1, 0), drain(ends[1]))
CALL(send_timeo, "send, sendto, sendmsg: with SO_SNDTIMEO", make_full_sockets(SO_SNDTIMEO), send(ends[0], bytes, 1, 0),
     drain(ends[1]))
CALL(accept, "accept", make_listener(false), accept(ends[0], NULL, NULL),
     CHECK_SYS(connect(ends[1], (void *)&address, sizeof(address))))
CALL(accept_timeo, "accept: with SO_RCVTIMEO", make_listener(false);
     CHECK_SYS(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){60, 0}, sizeof(struct timeval))),
     accept(ends[0], NULL, NULL), CHECK_SYS(connect(ends[1], (void *)&address, sizeof(address))))
CALL(connect, "connect", make_listener(true), connect(ends[1], (void *)&address, sizeof(address)),
     CHECK_SYS(accept(ends[0], NULL, NULL)))
CALL(connect_timeo, "connect: with SO_SNDTIMEO", make_listener(true);
     CHECK_SYS(setsockopt(ends[1], SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){60, 0}, sizeof(struct timeval))),
     connect(ends[1], (void *)&address, sizeof(address)), CHECK_SYS(accept(ends[0], NULL, NULL)))
CALL(poll, "poll", make_pipe(), poll_on(ends[0], false, true), put())
CALL(poll_ever, "poll: without a timeout", make_pipe(), poll_on(ends[0], false, false), put())
CALL(ppoll, "ppoll", make_pipe(), poll_on(ends[0], true, true), put())
CALL(select, "select", make_pipe(), select_on(ends[0], false), put())
CALL(pselect, "pselect", make_pipe(), select_on(ends[0], true), put())
CALL(epoll_wait, "epoll_wait, epoll_pwait", make_epoll(), epoll_wait(queue, events, 1, LONG_MS), put())
CALL(epoll_ever, "epoll_wait: without a timeout", make_epoll(), epoll_wait(queue, events, 1, -1), put())
CALL(nanosleep, "nanosleep, usleep, sleep", , nanosleep(&(struct timespec){2, 0}, NULL), )
CALL(clock_nanosleep, "clock_nanosleep", , sleep_on(CLOCK_MONOTONIC, 0), )
CALL(clock_abstime, "clock_nanosleep: TIMER_ABSTIME", , sleep_on(CLOCK_MONOTONIC, TIMER_ABSTIME), )
CALL(futex_wait, "futex: FUTEX_WAIT", word = 0, futex(false), wake_futex())
CALL(futex_timed, "futex: FUTEX_WAIT with a timeout", word = 0, futex(true), wake_futex())
CALL(sem_wait, "sem_wait", sem_init(&semaphore, 0, 0), wait_on_semaphore(false), sem_post(&semaphore))
CALL(sem_timedwait, "sem_timedwait", sem_init(&semaphore, 0, 0), wait_on_semaphore(true), sem_post(&semaphore))
CALL(mutex, "pthread_mutex_lock", pthread_mutex_lock(&mutex),
     error_of(pthread_mutex_lock(&mutex)) + error_of(pthread_mutex_unlock(&mutex)), pthread_mutex_unlock(&mutex))
CALL(cond_wait, "pthread_cond_wait", word = 0, wait_on_condition(false), signal_condition())
CALL(cond_timedwait, "pthread_cond_timedwait", word = 0, wait_on_condition(true), signal_condition())
CALL(msgrcv, "msgrcv", make_queue(), msgrcv(queue, bytes, 8, 0, 0), send_to_queue(); msgctl(queue, IPC_RMID, NULL))
CALL(semop, "semop", make_semaphores(), change_semaphore(-1, false), change_semaphore(1, false))
CALL(semtimedop, "semtimedop", make_semaphores(), change_semaphore(-1, true), change_semaphore(1, false))
CALL(mq_receive, "mq_receive", make_messages(), receive_message(false), CHECK_SYS(mq_send(messages, "x", 1, 0)))
CALL(mq_timedreceive, "mq_timedreceive", make_messages(), receive_message(true),
     CHECK_SYS(mq_send(messages, "x", 1, 0)))
CALL(sigwaitinfo, "sigwaitinfo", block_wanted(), wait_for_signal(false), kick())
CALL(sigtimedwait, "sigtimedwait", block_wanted(), wait_for_signal(true), kick())
CALL(sigsuspend, "sigsuspend, pause", signal(SIGUSR2, on_kick), pause(), kick())
CALL(flock, "flock", make_file(); CHECK_SYS(flock(ends[0], LOCK_EX)), flock(ends[1], LOCK_EX), flock(ends[0], LOCK_UN))
CALL(setlkw, "fcntl: F_SETLKW", make_file(); CHECK_SYS(lock_file(ends[0], F_OFD_SETLK, F_WRLCK)),
					     lock_file(ends[1], F_SETLKW, F_WRLCK),
					     lock_file(ends[0], F_OFD_SETLK, F_UNLCK))
CALL(ofd_setlkw, "fcntl: F_OFD_SETLKW", make_file(); CHECK_SYS(lock_file(ends[0], F_OFD_SETLK, F_WRLCK)),
						     lock_file(ends[1], F_OFD_SETLKW, F_WRLCK),
						     lock_file(ends[0], F_OFD_SETLK, F_UNLCK))
CALL(open_fifo, "open: FIFO", make_fifo(), open(path, O_RDONLY), CHECK_SYS(open(path, O_WRONLY | O_NONBLOCK)))
CALL(waitpid, "waitpid, wait4, wait", make_child(), waitpid(child, NULL, 0), kill(child, SIGKILL))
CALL(waitid, "waitid", make_child(), waitid(P_PID, (id_t)child, &(siginfo_t){0}, WEXITED), kill(child, SIGKILL))
CALL(join, "pthread_join", word = 0;
     CHECK_EQ(pthread_create(&sitter, NULL, until_word, NULL), 0), join_self(), word = 1)

/* ---- one after the other ---------------------------------------------------------------------------------------------- */

struct seat {
	struct call *call;
	long result;
	int error;
	uint32_t done;
	int tid;
};

static void *sit(void *argument)
{
	struct seat *seat = argument;
	ksm_store_release(&seat->tid, ksm_os_tid());
	errno = 0;
	seat->result = seat->call->sit();
	seat->error = errno;
	ksm_store_release(&seat->done, 1);
	return NULL;
}

/* It sleeps in the kernel, and has for some time: it has come to the call. */
static bool is_seated(const struct seat *seat)
{
	char file[64], text[256];
	snprintf(file, sizeof(file), "/proc/self/task/%d/stat", seat->tid);
	for (int i = 0; i < 5; i++, ksm_os_sleep_ns(500000))
		if (ksm_os_read_file(AT_FDCWD, file, text, sizeof(text)) <= 0 || !strstr(text, ") S "))
			return false;
	return true;
}

static void try_call(struct ksm_park *park, struct call *call)
{
	struct seat seat = {.call = call};
	pthread_t thread;
	call->prepare();
	CHECK_EQ(pthread_create(&thread, NULL, sit, &seat), 0);
	if (call->sit != sit_join)
		sitter = thread;
	KIT_WAIT(10, ksm_load_acquire(&seat.tid));
	KIT_WAIT(10, is_seated(&seat));
	CHECK(!ksm_load_acquire(&seat.done));
	for (int i = 0; i < 3 && !ksm_load_acquire(&seat.done); i++) {
		parking_stop(park);
		CHECK(!ksm_load_acquire(&seat.done));
		ksm_park_end(park);
		kit_sleep_ms(3);
	}
	KIT_WAIT(10, ksm_load_acquire(&seat.done) || is_seated(&seat));
	bool done = ksm_load_acquire(&seat.done);
	if (done && !(seat.result < 0 && seat.error == EINTR))
		FAIL("%s returned %ld, errno %d", call->name, seat.result, seat.error);
	printf("%s\t%s\n", call->name, done ? "EINTR" : "goes on");
	call->come();
	pthread_join(thread, NULL);
	if (!done && seat.result < 0)
		FAIL("%s failed afterwards, errno %d", call->name, seat.error);
}

int main_of_eintr(void);

TEST(every_call)
{
	struct ksm_park park = parking_lot();
	for (struct call *call = calls; call; call = call->next)
		try_call(&park, call);
	ksm_park_destroy(&park);
}
