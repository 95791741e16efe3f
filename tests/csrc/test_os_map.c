/* SPDX-License-Identifier: MIT */
/* What is mapped where, as the kernel says it in either way; and our own memory read without faulting. */
#include "kit.h"

#include <sys/sysmacros.h>

#define MOST 64

struct seen {
	struct ksm_os_mapping mappings[MOST];
	size_t count;
};

static void see(const struct ksm_os_mapping *mapping, void *context)
{
	struct seen *seen = context;
	CHECK_LT(seen->count, MOST);
	seen->mappings[seen->count++] = *mapping;
}

/* by_list: as on a kernel that has no PROCMAP_QUERY. */
static struct seen look(const void *at, size_t pages, bool by_list)
{
	struct seen seen = {.count = 0};
	int fd = ksm_os_open(AT_FDCWD, "/proc/self/maps", O_RDONLY, 0);
	CHECK_GE(fd, 0);
	if (by_list)
		ksm_os_fault_set(KSM_OS_MAP_QUERY, 0, UINT32_MAX, -ENOTTY);
	int r = ksm_os_mappings(fd, at, pages * KSM_PAGE_SIZE, see, &seen);
	ksm_os_fault_clear();
	if (by_list)
		CHECK_EQ(r, 1);
	else
		CHECK(r == 0 || r == 1); /* Linux before 6.11 */
	ksm_os_close(fd);
	return seen;
}

static void *map_at(char *at, size_t pages, int protection, int flags, int fd, size_t offset)
{
	void *p = mmap(at, pages * KSM_PAGE_SIZE, protection, flags | MAP_FIXED, fd, (off_t)(offset * KSM_PAGE_SIZE));
	CHECK(p == at);
	return p;
}

static int file_of(size_t pages)
{
	int fd = ksm_os_memfd("file");
	CHECK_GE(fd, 0);
	CHECK_EQ(ksm_os_truncate(fd, pages * KSM_PAGE_SIZE), 0);
	return fd;
}

static void check_one(const struct ksm_os_mapping *m, const char *from, size_t pages, unsigned access, bool shared)
{
	CHECK_EQ(m->from, (uintptr_t)from);
	CHECK_EQ(m->to - m->from, pages * KSM_PAGE_SIZE);
	CHECK_EQ(m->access, access);
	CHECK_EQ(m->shared, shared);
}

static void every_kind(bool by_list)
{
	const unsigned rw = KSM_MAPPING_READ | KSM_MAPPING_WRITE;
	struct stat stat;
	char *around = kit_map(12), *at = kit_page(around, 1); /* a hole on either side: nothing joins a neighbour */
	int file = file_of(20);
	CHECK_SYS(fstat(file, &stat));
	CHECK_SYS(munmap(around, 12 * KSM_PAGE_SIZE));
	map_at(kit_page(at, 0), 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	map_at(kit_page(at, 1), 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	/* page 2: nothing */
	map_at(kit_page(at, 3), 2, PROT_READ, MAP_PRIVATE, file, 7);
	map_at(kit_page(at, 5), 1, PROT_READ | PROT_WRITE, MAP_SHARED, file, 11);
	map_at(kit_page(at, 6), 1, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	map_at(kit_page(at, 7), 3, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct seen seen = look(at, 10, by_list);
	CHECK_EQ(seen.count, 6);
	struct ksm_os_mapping *m = seen.mappings;
	check_one(&m[0], kit_page(at, 0), 1, rw, false);
	check_one(&m[1], kit_page(at, 1), 1, 0, false);
	check_one(&m[2], kit_page(at, 3), 2, KSM_MAPPING_READ, false);
	check_one(&m[3], kit_page(at, 5), 1, rw, true);
	check_one(&m[4], kit_page(at, 6), 1, KSM_MAPPING_READ | KSM_MAPPING_EXECUTE, false);
	check_one(&m[5], kit_page(at, 7), 3, rw, true);
	CHECK_EQ(m[0].inode, 0);
	CHECK_EQ(m[1].inode, 0);
	CHECK_EQ(m[4].inode, 0);
	CHECK_NE(m[5].inode, 0); /* shared memory is a file to the kernel */
	for (size_t i = 2; i <= 3; i++) {
		CHECK_EQ(m[i].inode, stat.st_ino);
		CHECK_EQ(m[i].major, major(stat.st_dev));
		CHECK_EQ(m[i].minor, minor(stat.st_dev));
		CHECK_EQ(m[i].offset, (i == 2 ? 7 : 11) * KSM_PAGE_SIZE);
	}
	seen = look(kit_page(at, 4), 2, by_list); /* from the middle of one to the end of another */
	CHECK_EQ(seen.count, 2);
	check_one(&seen.mappings[0], kit_page(at, 3), 2, KSM_MAPPING_READ, false);
	CHECK_EQ(look(kit_page(at, 2), 1, by_list).count, 0);
}

TEST(every_kind_of_mapping)
{
	every_kind(false);
}

TEST(every_kind_of_mapping_from_the_list)
{
	every_kind(true);
}

/* The list is longer than what is read at a time, and paths are as long as they get. */
TEST(a_long_list)
{
	char folder[64], name[256], path[4096];
	snprintf(folder, sizeof(folder), "%s", kit_directory());
	memset(name, 'x', sizeof(name) - 1);
	name[sizeof(name) - 1] = 0;
	snprintf(path, sizeof(path), "%s/%s 0-1 rw-s 00 (deleted)", folder, "a b");
	int odd = open(path, O_RDWR | O_CREAT, 0600);
	snprintf(path, sizeof(path), "%s/%s", folder, name);
	int file = open(path, O_RDWR | O_CREAT, 0600);
	CHECK_SYS(file);
	CHECK_SYS(odd);
	CHECK_SYS(ftruncate(file, 64 * KSM_PAGE_SIZE));
	CHECK_SYS(ftruncate(odd, KSM_PAGE_SIZE));
	char *at = kit_map(64);
	for (size_t i = 0; i < 64; i += 2)
		map_at(kit_page(at, i), 1, PROT_READ, MAP_PRIVATE, i == 10 ? odd : file, i == 10 ? 0 : i);
	struct seen by_query = look(at, 64, false), by_list = look(at, 64, true);
	CHECK_EQ(by_query.count, 64);
	CHECK_EQ(by_list.count, 64);
	for (size_t i = 0; i < 64; i++) {
		const struct ksm_os_mapping *a = &by_query.mappings[i], *b = &by_list.mappings[i];
		check_one(b, (char *)a->from, (a->to - a->from) / KSM_PAGE_SIZE, a->access, a->shared);
		CHECK_EQ(a->inode, b->inode);
		CHECK_EQ(a->offset, b->offset);
	}
}

TEST(what_the_kernel_says_no_to)
{
	struct seen seen = {.count = 0};
	int fd = ksm_os_open(AT_FDCWD, "/proc/self/maps", O_RDONLY, 0);
	ksm_os_fault_set(KSM_OS_MAP_QUERY, 0, 1, -ENOMEM);
	CHECK_EQ(ksm_os_mappings(fd, &fd, 1, see, &seen), -ENOMEM);
	ksm_os_fault_clear();
	CHECK_LT(ksm_os_mappings(-1, &fd, 1, see, &seen), 0);
	CHECK_EQ(seen.count, 0);
	ksm_os_close(fd);
}

TEST(reading_our_own_memory)
{
	char bytes[2 * KSM_PAGE_SIZE];
	char *at = kit_map_filled(4, 1);
	CHECK_EQ(ksm_os_read_own(at, bytes, sizeof(bytes)), 0);
	kit_check_filled(bytes, 2, 1);
	CHECK_SYS(mprotect(kit_page(at, 1), KSM_PAGE_SIZE, PROT_NONE));
	CHECK_EQ(ksm_os_read_own(kit_page(at, 1), bytes, KSM_PAGE_SIZE), -EFAULT);
	CHECK_EQ(ksm_os_read_own(at, bytes, 2 * KSM_PAGE_SIZE), -EFAULT); /* half of it is not enough */
	CHECK_SYS(munmap(kit_page(at, 2), KSM_PAGE_SIZE));
	CHECK_EQ(ksm_os_read_own(kit_page(at, 2), bytes, KSM_PAGE_SIZE), -EFAULT);
	CHECK_EQ(ksm_os_read_own(kit_page(at, 3), bytes, KSM_PAGE_SIZE), 0);
	CHECK(kit_is(bytes, 4));
	int empty = file_of(0);
	map_at(kit_page(at, 2), 1, PROT_READ, MAP_PRIVATE, empty, 0); /* a load would end in SIGBUS */
	CHECK_EQ(ksm_os_read_own(kit_page(at, 2), bytes, KSM_PAGE_SIZE), -EFAULT);
}
