/* SPDX-License-Identifier: MIT */
/*
 * The index, the candidates, frames and the sweep: three peers of one domain, in one process, against a table of what
 * each of them refers to. Always: a frame that somebody refers to keeps its bytes and is not handed out again, and numbers
 * that come out of shared memory are numbers of frames. And as long as nobody has scribbled over shared memory: what was
 * published is found, what nobody refers to is freed, one peer at most has a claim, and the domain is valid.
 */
#include "fuzz.h"

#include "atomic.h"
#include "error.h"
#include "index.h"
#include "os.h"
#include "page.h"
#include "rendezvous.h"
#include "sweep.h"
#include "valid.h"

#include <errno.h>
#include <unistd.h>

#define PEERS 3
#define FRAMES 96
#define CONTENTS 12
#define PLACES 3 /* pages of a peer's that may hold one content */
#define STEPS 400
#define TORN (CONTENTS - 1) /* as content 0 is when half of it has been written */
#define NOTHING UINT8_MAX

static const uint8_t id[16] = "fuzz";
static struct ksm_peer peers[PEERS];
static struct ksm_index indexes[PEERS];
static unsigned refs[PEERS][FRAMES];
static uint8_t contents[FRAMES];  /* of frames that were published; NOTHING: not, or freed since */
static unsigned claims[CONTENTS]; /* whose, plus 1 */
static bool may_scribble, scribbled;
static struct fuzz_input input;
static unsigned working; /* who writes or frees frames */

/* ---- the domain ------------------------------------------------------------------------------------------------- */

static const void *page_of(unsigned content)
{
	static uint64_t pages[CONTENTS][KSM_PAGE_SIZE / 8];
	if (content && !pages[0][0])
		page_of(0);
	if (!pages[content][0])
		for (size_t i = 0; i < KSM_PAGE_SIZE / 8; i++)
			pages[content][i] = content == TORN ? pages[0][i] * (i < KSM_PAGE_SIZE / 16)
							    : (content + 1) * 0x9e3779b97f4a7c15ull + i * i;
	return pages[content];
}

static uint64_t digest_of(unsigned content)
{
	static uint64_t digests[CONTENTS];
	if (!digests[content])
		digests[content] = ksm_page_digest(page_of(content));
	return digests[content];
}

static void *place_of(unsigned place)
{
	return (void *)((uintptr_t)(place + 1) << 20);
}

static int copy_of(int fd)
{
	int copy = dup(fd);
	FUZZ_CHECK(copy >= 0);
	return copy;
}

static void sit(unsigned p)
{
	struct ksm_seat seat;
	int r = ksm_seat_take(&peers[p], false, &seat);
	FUZZ_CHECK(r == 0);
	ksm_peer_sit(&peers[p], &seat);
	ksm_index_attach(&indexes[p], &peers[p]);
}

/* As the exchange would: everybody has everybody's bitmap. */
static void get_to_know(void)
{
	for (unsigned p = 0; p < PEERS; p++) {
		for (unsigned other = 0; ksm_peer_refresh(&peers[p]) && other < PEERS; other++) {
			const struct ksm_seat *seat = &peers[other].seat;
			if (other != p && !ksm_peer_has_bitmap(&peers[p], seat->slot))
				FUZZ_CHECK(!ksm_peer_attach_bitmap(&peers[p], seat->slot, copy_of(seat->bitmap_fd)));
		}
		FUZZ_CHECK(peers[p].living_known);
	}
}

static void create(void)
{
	int file = ksm_os_memfd("domain"), control = ksm_os_memfd("control"), store = ksm_os_memfd("store");
	FUZZ_CHECK(file >= 0 && control >= 0 && store >= 0);
	FUZZ_CHECK(ksm_rendezvous_write(file, id, KSM_BACKING_MEMFD) == 0);
	FUZZ_CHECK(ksm_store_prepare(store, FRAMES, KSM_BACKING_MEMFD) == 0);
	for (unsigned p = 0; p < PEERS; p++) {
		struct ksm_peer *peer = &peers[p];
		ksm_peer_init(peer);
		if (p == 0)
			FUZZ_CHECK(!ksm_peer_create_control(peer, control, FRAMES, KSM_BACKING_MEMFD, id));
		else
			FUZZ_CHECK(!ksm_peer_map_control(peer, copy_of(control)));
		peer->fds.file = p ? copy_of(file) : file;
		peer->fds.store = p ? copy_of(store) : store;
		sit(p);
	}
	get_to_know();
	memset(refs, 0, sizeof(refs));
	memset(contents, NOTHING, sizeof(contents));
	memset(claims, 0, sizeof(claims));
	scribbled = false;
}

static bool is_referred(unsigned frame)
{
	bool any = false;
	for (unsigned p = 0; p < PEERS; p++)
		any |= refs[p][frame] != 0;
	return any;
}

static void check_references(void)
{
	for (unsigned frame = 0; frame < FRAMES; frame++) {
		for (unsigned p = 0; p < PEERS; p++) {
			FUZZ_CHECK(peers[p].counts[frame] == refs[p][frame]);
			FUZZ_CHECK(!refs[p][frame] || ksm_bit_test(&peers[p], frame)); /* REFS-1 */
		}
	}
}

/* Whatever happened to the words: bytes that somebody relies on are there. */
static void check_bytes(void)
{
	char page[KSM_PAGE_SIZE];
	for (unsigned frame = 0; frame < FRAMES; frame++) {
		if (!is_referred(frame))
			continue;
		FUZZ_CHECK(!ksm_frame_read(&peers[0], frame, 1, page));
		FUZZ_CHECK(!memcmp(page, page_of(contents[frame]), sizeof(page)));
	}
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

static void step_publish(unsigned p, unsigned content)
{
	ksm_frameno want = fuzz_byte(&input), frame = KSM_NO_FRAME;
	bool abandons = want % 8 == 7;
	int r = ksm_frame_alloc(&peers[p], want < FRAMES ? want : KSM_NO_FRAME, &frame);
	if (r) {
		FUZZ_CHECK(r == -ENOSPC || r == -EAGAIN);
		return;
	}
	FUZZ_CHECK(frame < FRAMES && !is_referred(frame)); /* FRAME-1 */
	if (abandons) {
		ksm_frame_abandon(&peers[p], frame);
		return;
	}
	working = p;
	FUZZ_CHECK(!ksm_frame_write(&peers[p], frame, 1, page_of(content)));
	FUZZ_CHECK(!is_referred(frame) || contents[frame] == content); /* FRAME-3 */
	uint32_t generation = ksm_frame_publish(&peers[p], frame, digest_of(content));
	ksm_index_insert(&indexes[p], &peers[p], digest_of(content), frame, generation);
	contents[frame] = (uint8_t)content;
	refs[p][frame]++;
}

static bool is_published(unsigned content)
{
	for (unsigned frame = 0; frame < FRAMES; frame++)
		if (contents[frame] == content)
			return true;
	return false;
}

/* A frame was taken: is it what was looked for? */
static void compare(unsigned p, unsigned content, ksm_frameno frame)
{
	char page[KSM_PAGE_SIZE];
	FUZZ_CHECK(frame < FRAMES);
	FUZZ_CHECK(!ksm_frame_read(&peers[p], frame, 1, page));
	if (memcmp(page, page_of(content), sizeof(page))) { /* MERGE-1 */
		FUZZ_CHECK(scribbled);
		ksm_frame_put(&peers[p], frame, 1);
		return;
	}
	FUZZ_CHECK(scribbled || contents[frame] == content);
	contents[frame] = (uint8_t)content;
	refs[p][frame]++;
}

static void step_take(unsigned p, unsigned content, ksm_frameno prefer)
{
	ksm_frameno frame = ksm_index_take(&indexes[p], &peers[p], digest_of(content), prefer);
	if (frame == KSM_NO_FRAME)
		FUZZ_CHECK(scribbled || !is_published(content));
	else
		compare(p, content, frame);
}

static void step_put(unsigned p, unsigned frame)
{
	for (unsigned i = 0; i < FRAMES; i++) {
		unsigned at = (frame + i) % FRAMES;
		if (!refs[p][at])
			continue;
		ksm_frame_put(&peers[p], at, 1);
		refs[p][at]--;
		return;
	}
}

static void step_sweep(unsigned p)
{
	working = p;
	int freed = 0, r = ksm_sweep_chunk(&peers[p], 0);
	for (unsigned frame = 0; frame < FRAMES; frame++) {
		if (contents[frame] == NOTHING || is_referred(frame))
			continue;
		freed++;
		contents[frame] = NOTHING;
	}
	FUZZ_CHECK(scribbled || r == freed);
	check_bytes();
}

static void step_candidates(unsigned p, unsigned content, unsigned what, unsigned place)
{
	struct ksm_index *index = &indexes[p];
	struct ksm_peer *peer = &peers[p];
	uint64_t digest = digest_of(content);
	void *page = place_of(place);
	unsigned other = claims[content] && claims[content] != p + 1 ? claims[content] : 0;
	enum ksm_candidate found;
	switch (what) {
	case 0:
		ksm_candidate_add(index, peer, digest, page);
		found = ksm_candidate_find(index, peer, digest, page);
		FUZZ_CHECK(scribbled || found != KSM_CANDIDATE_NONE);
		FUZZ_CHECK(scribbled || !other || found == KSM_CANDIDATE_CLAIMED);
		break;
	case 1:
		ksm_candidate_remove(index, peer, digest, page);
		break;
	case 2:
		if (!ksm_candidate_claim(index, peer, digest, page))
			return;
		FUZZ_CHECK(scribbled || !other);
		claims[content] = p + 1;
		for (unsigned i = 0; i < PEERS && !scribbled; i++)
			FUZZ_CHECK(i == p ||
				   ksm_candidate_find(&indexes[i], &peers[i], digest, page) == KSM_CANDIDATE_CLAIMED);
		break;
	default:
		if (claims[content] != p + 1)
			return;
		for (unsigned i = 0; i < PLACES; i++)
			ksm_candidate_unclaim(index, peer, digest, place_of(i));
		claims[content] = 0;
	}
}

/* It dies, and another takes its place. */
static void step_death(unsigned p)
{
	ksm_seat_leave(&peers[p].seat);
	memset(peers[p].counts, 0, FRAMES * sizeof(*peers[p].counts));
	memset(refs[p], 0, sizeof(refs[p]));
	for (unsigned content = 0; content < CONTENTS; content++)
		if (claims[content] == p + 1)
			claims[content] = 0;
	sit(p);
	get_to_know();
}

static void step_scribble(void)
{
	const struct ksm_layout *layout = &peers[0].layout;
	const uint64_t starts[] = {0,
				   layout->slots,
				   layout->chunks,
				   layout->cells,
				   layout->checks,
				   layout->index,
				   layout->candidates,
				   layout->index_touched,
				   layout->total};
	unsigned part = fuzz_byte(&input) % (KSM_COUNT(starts) - 1);
	uint64_t words = (starts[part + 1] - starts[part]) / 8;
	if (part <= 4) /* where something is */
		words = KSM_MIN(words, part == 1 ? PEERS * (uint64_t)KSM_SLOT_SIZE / 8 : (uint64_t)FRAMES);
	uint64_t *at = (uint64_t *)((char *)peers[0].control + starts[part]) + fuzz_number(&input, 2) % words;
	switch (fuzz_byte(&input) % 3) {
	case 0:
		*at = fuzz_number(&input, 8);
		break;
	case 1:
		*at ^= 1ull << fuzz_byte(&input) % 64;
		break;
	default:
		*at += fuzz_byte(&input) - 128u;
	}
	scribbled = true;
}

/* ---- while others write and free frames ------------------------------------------------------------------------------ */

/* A frame that is being written or freed says PUBLISHED, and another peer finds it. */
static void meanwhile(uint64_t first, uint64_t count)
{
	static bool within;
	if (within || !may_scribble || !input.left || !count)
		return;
	within = true;
	for (unsigned n = fuzz_byte(&input) % 4; n; n--) {
		uint8_t what = fuzz_byte(&input), content = fuzz_byte(&input) % CONTENTS;
		ksm_frameno frame = (ksm_frameno)(first + fuzz_byte(&input) % count);
		unsigned other = (working + 1 + what / 4 % (PEERS - 1)) % PEERS;
		uint64_t *cell = &peers[0].cells[frame];
		scribbled = true;
		if (what % 4 == 0) {
			step_scribble();
			continue;
		}
		*cell = ksm_cell_make(KSM_CELL_PUBLISHED, 0, 0, ksm_cell_generation(*cell));
		peers[0].checks[frame] = (uint32_t)(digest_of(content) >> KSM_DIGEST_CHECK_SHIFT);
		if (what % 4 == 1)
			step_take(other, content, frame);
		else if (ksm_frame_take(&peers[other], frame, 0, 0))
			compare(other, content, frame);
	}
	within = false;
}

int __real_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes);
int __wrap_ksm_os_punch(int fd, uint64_t offset, uint64_t nbytes)
{
	meanwhile(offset / KSM_PAGE_SIZE, nbytes / KSM_PAGE_SIZE);
	return __real_ksm_os_punch(fd, offset, nbytes);
}

int __real_ksm_os_pwrite(int fd, const void *from, size_t nbytes, uint64_t offset);
int __wrap_ksm_os_pwrite(int fd, const void *from, size_t nbytes, uint64_t offset);
int __wrap_ksm_os_pwrite(int fd, const void *from, size_t nbytes, uint64_t offset)
{
	if (fd == peers[working].fds.store && !__real_ksm_os_pwrite(fd, from, nbytes / 2, offset))
		meanwhile(offset / KSM_PAGE_SIZE, nbytes / KSM_PAGE_SIZE);
	return __real_ksm_os_pwrite(fd, from, nbytes, offset);
}

/* ---- a play ------------------------------------------------------------------------------------------------------- */

static void check_domain(void)
{
	char why[256] = "";
	get_to_know();
	int r = ksm_domain_is_valid(&peers[0], KSM_VALID_AT_REST, why, sizeof(why));
	if (!r) {
		step_sweep(0);
		r = ksm_domain_is_valid(&peers[0], KSM_VALID_SWEPT, why, sizeof(why));
	}
	if (r)
		fprintf(stderr, "%s: %s\n", ksm_error_name(r), why);
	FUZZ_CHECK(r == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	may_scribble = false;
	create();
	input = (struct fuzz_input){data, size};
	may_scribble = fuzz_byte(&input) % 2;
	for (unsigned step = 0; input.left && step < STEPS; step++) {
		uint8_t what = fuzz_byte(&input), which = fuzz_byte(&input);
		unsigned p = which % PEERS, content = which / PEERS % CONTENTS;
		if (what < 60)
			step_publish(p, content);
		else if (what < 110)
			step_take(p, content, what % 2 ? KSM_NO_FRAME : fuzz_byte(&input));
		else if (what < 160)
			step_put(p, fuzz_byte(&input));
		else if (what < 180)
			step_sweep(p);
		else if (what < 225)
			step_candidates(p, content, what % 4, what / 4 % PLACES);
		else if (what < 230)
			step_death(p);
		else if (may_scribble)
			step_scribble();
		check_references();
	}
	check_bytes();
	if (!scribbled)
		check_domain();
	for (unsigned p = 0; p < PEERS; p++)
		ksm_peer_destroy(&peers[p]);
	return 0;
}
