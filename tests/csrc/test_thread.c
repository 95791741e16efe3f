/* SPDX-License-Identifier: MIT */
#include "kit.h"

#include "thread.h"

#include <linux/io_uring.h>

struct sleeper {
	pthread_t thread;
	uint32_t tid, over;
	const char *name;
	bool blocks;
};

static void *sleep_until_over(void *argument)
{
	struct sleeper *self = argument;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	if (self->blocks)
		pthread_sigmask(SIG_BLOCK, &set, NULL);
	prctl(PR_SET_NAME, self->name);
	ksm_store_release(&self->tid, (uint32_t)ksm_os_tid());
	while (!ksm_load_acquire(&self->over))
		kit_sleep_ms(1);
	return NULL;
}

static void start(struct sleeper *sleeper)
{
	CHECK_EQ(pthread_create(&sleeper->thread, NULL, sleep_until_over, sleeper), 0);
	KIT_WAIT(10, ksm_load_acquire(&sleeper->tid));
}

static void end(struct sleeper *sleeper)
{
	ksm_store_release(&sleeper->over, 1);
	pthread_join(sleeper->thread, NULL);
}

static int tasks_of_this(void)
{
	int tasks = ksm_os_open(AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY, 0);
	CHECK_GE(tasks, 0);
	return tasks;
}

TEST(names_and_states)
{
	struct ksm_thread found;
	struct sleeper odd = {.name = ") R (1 2"}, blocker = {.name = "iou-wrk-1", .blocks = true};
	int tasks = tasks_of_this();
	start(&odd);
	start(&blocker);
	KIT_WAIT(10, ksm_thread_look(tasks, (int)odd.tid, &found) && found.state == 'S');
	CHECK_STR_EQ(found.name, ") R (1 2");
	CHECK(ksm_thread_look(tasks, (int)blocker.tid, &found));
	CHECK_STR_EQ(found.name, "iou-wrk-1");
	CHECK(!found.kernels); /* the name alone makes no thread of the kernel's */
	CHECK(ksm_thread_look(tasks, ksm_os_tid(), &found));
	CHECK_EQ(found.state, 'R');
	CHECK(ksm_thread_blocks(tasks, (int)blocker.tid, SIGRTMIN + 2));
	CHECK(!ksm_thread_blocks(tasks, (int)blocker.tid, SIGRTMIN + 3));
	CHECK(!ksm_thread_blocks(tasks, (int)odd.tid, SIGRTMIN + 2));
	CHECK(!ksm_thread_in_vfork(tasks, (int)odd.tid));
	CHECK(!ksm_thread_in_vfork(tasks, ksm_os_tid()));
	end(&odd);
	end(&blocker);
	KIT_WAIT(10, !ksm_thread_look(tasks, (int)odd.tid, &found));
	CHECK_STR_EQ(found.name, "");
	KIT_WAIT(10, !ksm_thread_blocks(tasks, (int)blocker.tid, SIGRTMIN + 2)); /* joined comes before gone */
	close(tasks);
}

static int of_kernel(int tasks)
{
	struct ksm_thread found;
	int n = 0;
	DIR *directory = opendir("/proc/self/task");
	for (struct dirent *entry; (entry = readdir(directory));)
		if (atoi(entry->d_name) && ksm_thread_look(tasks, atoi(entry->d_name), &found))
			n += found.kernels;
	closedir(directory);
	return n;
}

TEST(threads_of_the_kernels)
{
	struct io_uring_params params = {.flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 1};
	int tasks = tasks_of_this();
	CHECK_EQ(of_kernel(tasks), 0);
	int ring = (int)syscall(SYS_io_uring_setup, 2, &params);
	if (ring < 0) {
		printf("no io_uring here: %s\n", strerror(errno));
		return;
	}
	CHECK_EQ(of_kernel(tasks), 1);
	close(ring);
	KIT_WAIT(10, of_kernel(tasks) == 0);
	close(tasks);
}
