/* SPDX-License-Identifier: MIT */
/* What has become of registered memory: every verdict, SURVEY-1 to 3. */
#include "members.h"

#include "survey.h"

#define PAGES 8
#define AT 3 /* the page that things happen to */

struct field {
	struct ksm_member *member;
	struct ksm_region *region;
	char *at;
	char *page;
};

static struct field field_of(bool merged)
{
	struct field f = {.member = members_join_with("d", KSM_BARRIER_STOP), .at = kit_map_filled(PAGES, 1)};
	f.page = kit_page(f.at, AT);
	f.region = members_region(f.member, f.at, PAGES);
	f.region->registered = true;
	if (merged) {
		members_region(f.member, kit_map_filled(PAGES, 1), PAGES);
		CHECK_EQ(members_merge(f.member), 2 * PAGES);
	}
	return f;
}

static void put(const struct field *f, int protection, int flags, int fd, off_t offset)
{
	CHECK(mmap(f->page, KSM_PAGE_SIZE, protection, flags | MAP_FIXED, fd, offset) == f->page);
}

/* ---- what may be found there ------------------------------------------------------------------------------------- */

#define RW (PROT_READ | PROT_WRITE)

static void nothing(const struct field *f)
{
	(void)f;
}

static void unmapped(const struct field *f)
{
	CHECK_SYS(munmap(f->page, KSM_PAGE_SIZE));
}

static void moved(const struct field *f)
{
	char *to = kit_map(1);
	CHECK(mremap(f->page, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
}

static void fresh(const struct field *f)
{
	put(f, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void readable(const struct field *f)
{
	CHECK_SYS(mprotect(f->page, KSM_PAGE_SIZE, PROT_READ));
}

static void forbidden(const struct field *f)
{
	CHECK_SYS(mprotect(f->page, KSM_PAGE_SIZE, PROT_NONE));
}

static void executable(const struct field *f)
{
	CHECK_SYS(mprotect(f->page, KSM_PAGE_SIZE, RW | PROT_EXEC));
}

static void shared(const struct field *f)
{
	put(f, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static void a_file(const struct field *f)
{
	int fd = ksm_os_memfd("file");
	CHECK_EQ(ksm_os_truncate(fd, KSM_PAGE_SIZE), 0);
	put(f, RW, MAP_PRIVATE, fd, 0);
	close(fd);
}

static void a_shared_file(const struct field *f)
{
	int fd = ksm_os_memfd("file");
	CHECK_EQ(ksm_os_truncate(fd, KSM_PAGE_SIZE), 0);
	put(f, RW, MAP_SHARED, fd, 0);
	close(fd);
}

static void of_the_store(const struct field *f)
{
	put(f, RW, MAP_PRIVATE, f->member->peer.fds.store, 100 * KSM_PAGE_SIZE);
}

static void of_the_store_shared(const struct field *f)
{
	put(f, PROT_READ, MAP_SHARED, f->member->peer.fds.store, 0);
}

static void frame_with(const struct field *f, int protection)
{
	put(f, protection, MAP_PRIVATE, f->member->peer.fds.store,
	    (off_t)ksm_region_frame(f->region, AT) * (off_t)KSM_PAGE_SIZE);
}

static void its_frame(const struct field *f)
{
	frame_with(f, RW);
}

static void its_frame_readable(const struct field *f)
{
	frame_with(f, PROT_READ);
}

static void written(const struct field *f)
{
	kit_fill(f->page, 99);
}

static const struct verdict {
	void (*happens)(const struct field *f);
	const char *name;
	bool merged; /* before */
	enum ksm_survey found;
} verdicts[] = {
#define VERDICT(happens, merged, found) {happens, #happens, merged, KSM_SURVEY_##found}
	VERDICT(nothing, false, OURS),
	VERDICT(written, false, OURS),
	VERDICT(fresh, false, OURS), /* it is as good as the old one */
	VERDICT(unmapped, false, GONE),
	VERDICT(moved, false, GONE),
	VERDICT(readable, false, CHANGED),
	VERDICT(forbidden, false, CHANGED),
	VERDICT(executable, false, CHANGED),
	VERDICT(shared, false, GONE),
	VERDICT(a_file, false, GONE),
	VERDICT(a_shared_file, false, GONE),
	VERDICT(of_the_store, false, CHANGED), /* a frame that our words do not name: nobody can tell whose */
	VERDICT(of_the_store_shared, false, GONE),
	VERDICT(nothing, true, OURS),
	VERDICT(written, true, OURS), /* broken, and the mapping is the frame's */
	VERDICT(its_frame, true, OURS),
	VERDICT(its_frame_readable, true, CHANGED),
	VERDICT(readable, true, CHANGED),
	VERDICT(forbidden, true, CHANGED),
	VERDICT(unmapped, true, GONE),
	VERDICT(moved, true, GONE),
	VERDICT(fresh, true, GONE),
	VERDICT(shared, true, GONE),
	VERDICT(a_file, true, GONE),
	VERDICT(of_the_store, true, GONE), /* another frame */
	VERDICT(of_the_store_shared, true, GONE),
#undef VERDICT
};

static void check_verdict(const struct verdict *verdict, bool by_list)
{
	uint8_t found[PAGES];
	struct field f = field_of(verdict->merged);
	verdict->happens(&f);
	ksm_merge_lock(&f.member->peer);
	if (by_list)
		ksm_os_fault_set(KSM_OS_MAP_QUERY, 0, UINT32_MAX, -ENOTTY);
	ksm_survey(f.region, 0, PAGES, found);
	bool all = ksm_survey_is_ours(f.region, 0, PAGES);
	ksm_os_fault_clear();
	ksm_merge_unlock(&f.member->peer);
	for (size_t i = 0; i < PAGES; i++)
		if (found[i] != (i == AT ? verdict->found : KSM_SURVEY_OURS))
			FAIL("%s%s: page %zu is said to be %u", verdict->name, verdict->merged ? ", merged" : "", i,
			     found[i]);
	CHECK_EQ(all, verdict->found == KSM_SURVEY_OURS);
	f.region->registered = false; /* an arena's: believed, for nothing */
	ksm_survey(f.region, 0, PAGES, found);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(found[i], KSM_SURVEY_OURS);
	CHECK(ksm_survey_is_ours(f.region, 0, PAGES));
}

static void all_verdicts(bool by_list)
{
	kit_directory();
	for (size_t i = 0; i < KSM_COUNT(verdicts); i++) {
		pid_t child = kit_fork();
		if (child == 0) {
			check_verdict(&verdicts[i], by_list);
			_exit(0);
		}
		CHECK_CHILD(child);
	}
}

TEST(every_verdict)
{
	all_verdicts(false);
}

TEST(every_verdict_from_the_list)
{
	all_verdicts(true);
}

/* ---- guarded pages ------------------------------------------------------------------------------------------------- */

static enum ksm_survey found_at(const struct field *f)
{
	uint8_t found;
	ksm_survey(f->region, AT, 1, &found);
	return (enum ksm_survey)found;
}

TEST(what_guards_say)
{
	struct field f = field_of(true);
	CHECK_EQ(ksm_region_guard(f.region), 0);
	struct ksm_guard *guard = f.region->guard;
	CHECK_EQ(ksm_guard_get(guard, AT), KSM_GUARD_WRITABLE);
	ksm_guard_set(guard, AT, 1, KSM_GUARD_MERGED); /* read-only by us */
	its_frame_readable(&f);
	CHECK_EQ(found_at(&f), KSM_SURVEY_OURS);
	forbidden(&f);
	CHECK_EQ(found_at(&f), KSM_SURVEY_CHANGED);
	ksm_guard_set(guard, AT, 1, KSM_GUARD_OPEN); /* our handler has copied it, and nobody has seen that yet */
	fresh(&f);
	CHECK_EQ(found_at(&f), KSM_SURVEY_OURS);
	ksm_region_forget(f.region, AT, 1);
	readable(&f);
	CHECK_EQ(found_at(&f), KSM_SURVEY_CHANGED);
	ksm_guard_set(guard, AT, 1, KSM_GUARD_BUSY); /* in a window of "segv" */
	CHECK_EQ(found_at(&f), KSM_SURVEY_OURS);
	forbidden(&f);
	CHECK_EQ(found_at(&f), KSM_SURVEY_CHANGED);
}

/* ---- what follows -------------------------------------------------------------------------------------------------- */

TEST(what_is_gone_keeps_its_frame)
{
	uint8_t found[PAGES];
	struct field f = field_of(true);
	ksm_frameno frame = ksm_region_frame(f.region, AT);
	char *to = kit_map(1);
	CHECK(mremap(f.page, KSM_PAGE_SIZE, KSM_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	a_file(&f);
	CHECK_EQ(ksm_region_guard(f.region), 0);
	ksm_merge_lock(&f.member->peer);
	ksm_survey(f.region, 0, PAGES, found);
	CHECK(ksm_survey_give_up(f.region, 0, PAGES, found));
	ksm_merge_unlock(&f.member->peer);
	CHECK(f.region->gone);
	CHECK_EQ(f.region->strayed, 1);
	CHECK_EQ(ksm_region_state(f.region, AT), KSM_PAGE_UNKNOWN);
	CHECK_EQ(ksm_guard_get(f.region->guard, AT), KSM_GUARD_OPEN); /* a fault there is not ours */
	CHECK_EQ(ksm_guard_get(f.region->guard, AT + 1), KSM_GUARD_WRITABLE);
	ksm_survey(f.region, 0, PAGES, found);
	CHECK(ksm_survey_give_up(f.region, 0, PAGES, found)); /* once more: nothing is counted twice */
	CHECK_EQ(f.region->strayed, 1);
	for (struct ksm_region *region = f.member->scanner.regions, *next; region; region = next) {
		next = region->next;
		if (region != f.region)
			members_unmap(f.member, region);
	}
	CHECK_EQ(members_sweep(f.member), 0); /* the other pages of the region hold theirs */
	CHECK(kit_is(to, 1 + AT));
	CHECK(members_frame_is(f.member, frame, 1 + AT));
	CHECK_GT(f.member->peer.counts[frame], 0);
}

TEST(nothing_of_it_is_merged_again)
{
	struct field f = field_of(false);
	members_region(f.member, kit_map_filled(PAGES, 1), PAGES);
	unmapped(&f);
	struct ksm_merge_counts counts = members_pass(f.member);
	CHECK_EQ(counts.why_not, KSM_EMEMORY);
	fresh(&f);
	CHECK_EQ(members_merge(f.member), 0);
	CHECK_EQ(members_counter(f.member, KSM_PAGES_MERGED), 0);
}

TEST(what_has_another_protection_is_left_alone_until_it_has_the_old_one_again)
{
	struct field f = field_of(false);
	members_region(f.member, kit_map_filled(PAGES, 1), PAGES);
	readable(&f);
	uint64_t merged =
		members_merge(f.member); /* its twin has no twin, unless looks are dear: then it may have a frame */
	CHECK_GE(merged, 2 * PAGES - 2);
	CHECK_LT(merged, 2 * PAGES);
	CHECK(kit_is_readonly(f.page));
	CHECK_SYS(mprotect(f.page, KSM_PAGE_SIZE, RW));
	CHECK_EQ(merged + members_merge(f.member), 2 * PAGES);
	kit_check_filled(f.at, PAGES, 1);
}

/* ---- dear looks ------------------------------------------------------------------------------------------------------ */

static uint32_t looks(struct field *f, uint64_t ns)
{
	uint8_t found[PAGES];
	uint64_t until = ksm_os_now_ns() + ns;
	ksm_os_fault_set(KSM_OS_MAP_QUERY, 0, UINT32_MAX, -ENOTTY);
	uint32_t rounds = 0;
	for (; ksm_os_now_ns() < until; rounds++)
		ksm_survey_roughly(f->region, 0, PAGES, found);
	uint32_t calls = ksm_os_fault_calls(KSM_OS_MAP_QUERY);
	ksm_os_fault_clear();
	printf("%u looks in %u rounds\n", calls, rounds);
	return calls * 100 / rounds;
}

TEST(dear_looks_are_seldom)
{
	struct field f = field_of(false);
	for (size_t i = 0; i < 2000; i++) /* a list that takes its time: mappings that do not join */
		CHECK(mmap(NULL, KSM_PAGE_SIZE, i % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) !=
		      MAP_FAILED);
	CHECK_LT(looks(&f, 100000000), 10);
	unmapped(&f);
	uint8_t found[PAGES];
	KIT_WAIT(20, (ksm_survey_roughly(f.region, 0, PAGES, found), found[AT] == KSM_SURVEY_GONE));
}

TEST(without_proc_it_is_believed)
{
	uint8_t found[PAGES];
	struct field f = field_of(false);
	unmapped(&f);
	ksm_os_close(f.member->peer.fds.maps);
	f.member->peer.fds.maps = -1;
	ksm_survey(f.region, 0, PAGES, found);
	CHECK_EQ(found[AT], KSM_SURVEY_OURS);
}

TEST(a_look_that_fails_changes_nothing)
{
	uint8_t found[PAGES];
	struct field f = field_of(false);
	ksm_os_fault_set(KSM_OS_MAP_QUERY, 0, UINT32_MAX, -ENOMEM);
	ksm_survey(f.region, 0, PAGES, found);
	ksm_os_fault_clear();
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(found[i], KSM_SURVEY_CHANGED); /* neither touched nor given up */
	CHECK(!ksm_survey_give_up(f.region, 0, PAGES, found));
	CHECK(!f.region->gone);
}

/* ---- SURVEY-3, SURVEY-1, locks --------------------------------------------------------------------------------------- */

TEST(what_the_scanner_uses_is_nobodys)
{
	uint8_t found[PAGES];
	struct field f = field_of(false);
	f.member->peer.own[KSM_OWN_STACK] = (struct ksm_range){f.page + 100, 1};
	ksm_survey(f.region, 0, PAGES, found);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(found[i], i == AT ? KSM_SURVEY_GONE : KSM_SURVEY_OURS);
	f.member->peer.own[KSM_OWN_STACK] = (struct ksm_range){f.page - 1, 2}; /* of two pages */
	ksm_survey(f.region, 0, PAGES, found);
	CHECK_EQ(found[AT - 1], KSM_SURVEY_GONE);
	CHECK_EQ(found[AT], KSM_SURVEY_GONE);
	CHECK_EQ(found[AT + 1], KSM_SURVEY_OURS);
}

/* Registered, and unmapped by the program; then one of our own tables has come to lie there. */
static struct ksm_region *region_over(struct ksm_member *a, const void *table, size_t nbytes)
{
	struct ksm_region *region = members_region(a, (void *)table, nbytes / KSM_PAGE_SIZE);
	region->registered = true;
	return region;
}

static void check_left_out(struct ksm_member *a, struct ksm_region *region)
{
	for (size_t i = 0; i < region->room; i++) {
		uint8_t found = KSM_SURVEY_OURS;
		ksm_survey(region, i, 1, &found);
		CHECK_EQ(found, KSM_SURVEY_GONE);
	}
	CHECK_EQ(members_pass(a).why_not, KSM_EMEMORY);
	CHECK(region->gone);
	CHECK_EQ(region->states[KSM_PAGE_MERGED] + region->states[KSM_PAGE_DROPPED], 0);
	ksm_merge_lock(&a->peer);
	ksm_scanner_remove(&a->scanner, region);
	ksm_merge_unlock(&a->peer);
}

static void tables_on(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	struct ksm_region *guarded = members_region(a, kit_map_filled(PAGES, 1), PAGES), *region;
	members_region(a, kit_map_filled(PAGES, 1), PAGES);
	CHECK_EQ(members_merge(a), 2 * PAGES);
	check_left_out(a, region_over(a, a->peer.counts, 8 * KSM_PAGE_SIZE));
	if (a->scanner.barrier.scratch)
		check_left_out(a, region_over(a, a->scanner.barrier.scratch, KSM_SCRATCH_BYTES));
	CHECK_EQ(ksm_region_guard(guarded), 0);
	region = region_over(a, guarded->guard->bytes, KSM_PAGE_SIZE);
	region->guard = guarded->guard;
	check_left_out(a, region);
	region->guard = NULL;
	ksm_scanner_use(&a->scanner, &(struct ksm_barrier){.uffd = -1});
	CHECK_EQ(a->peer.own[KSM_OWN_SCRATCH].nbytes, 0);
}

TEST(the_tables_used_in_a_window_are_nobodys)
{
	members_on_each_barrier(tables_on);
}

TEST(bytes_are_read_without_faulting)
{
	uint64_t bytes[KSM_PAGE_SIZE / 8];
	struct field f = field_of(false);
	CHECK_EQ(ksm_survey_read(f.region, AT, bytes), 0);
	CHECK(kit_is(bytes, 1 + AT));
	forbidden(&f);
	CHECK_EQ(ksm_survey_read(f.region, AT, bytes), -EFAULT);
	unmapped(&f);
	CHECK_EQ(ksm_survey_read(f.region, AT, bytes), -EFAULT);
	ksm_os_fault_set(KSM_OS_READ_OWN, 0, UINT32_MAX, -EPERM); /* a filter: as everybody else */
	CHECK_EQ(ksm_survey_read(f.region, AT + 1, bytes), 0);
	ksm_os_fault_clear();
	CHECK(kit_is(bytes, 2 + AT));
}

TEST(locked_memory_is_told)
{
	char *at = kit_map_filled(4, 1);
	CHECK(!ksm_survey_is_locked(at, 4 * KSM_PAGE_SIZE));
	/* By the system call: under a sanitizer mlock() does nothing. */
	CHECK_SYS(syscall(SYS_mlock, kit_page(at, 2), KSM_PAGE_SIZE));
	CHECK(ksm_survey_is_locked(at, 4 * KSM_PAGE_SIZE));
	CHECK(!ksm_survey_is_locked(at, 2 * KSM_PAGE_SIZE));
	CHECK_SYS(syscall(SYS_munlock, kit_page(at, 2), KSM_PAGE_SIZE));
	CHECK(!ksm_survey_is_locked(at, 4 * KSM_PAGE_SIZE));
	kit_check_filled(at, 4, 1);
}

/* Under each barrier: the lock stays, the page is not merged, its neighbours are. */
static void locked_on(enum ksm_barrier_kind kind)
{
	struct ksm_member *a = members_join_with("d", kind);
	char *one = kit_map_filled(PAGES, 1), *two = kit_map_filled(PAGES, 1);
	struct ksm_region *region = members_region(a, one, PAGES);
	members_region(a, two, PAGES);
	region->registered = true;
	CHECK_SYS(syscall(SYS_mlock, kit_page(one, AT), KSM_PAGE_SIZE));
	members_merge(a);
	CHECK_EQ(region->states[KSM_PAGE_MERGED], PAGES - 1);
	CHECK_NE(ksm_region_state(region, AT), KSM_PAGE_MERGED);
	CHECK_EQ(kit_smaps_bytes(kit_page(one, AT), 1, "Locked"), KSM_PAGE_SIZE);
	kit_check_filled(one, PAGES, 1);
	members_leave(a);
}

TEST(locked_pages_stay_locked)
{
	members_on_each_barrier(locked_on);
}
