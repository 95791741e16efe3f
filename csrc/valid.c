/* SPDX-License-Identifier: MIT */
/*
 * DOC: What must hold
 *
 * This file owns nothing. It reads all that a domain shares (control memfd, bitmaps, tables, the store, the locks) and
 * the kernel's own list of what this process has mapped, and says in words what is wrong. It changes nothing, not even
 * by reading: parts of the memory files that nobody has written are not touched.
 *
 * Always, whoever is in the middle of what and whoever was killed there:
 *
 * VALID-1. Control, store and domain file are of one domain: magic, layout, id, sizes, seals.
 * VALID-2. Counts lie in their bounds, and a frame that is not FREE lies below frames_high: a sweep comes by.
 * VALID-3. A cell is in one of its states. FREE and PUBLISHED name no owner; the other states name a slot that has been
 *          taken, and an epoch that it has had, or nobody (DYING_RAW only).
 * VALID-4. A PUBLISHED frame has its bytes: there is data in the store, and its digest agrees with the frame's check.
 * VALID-5. A FREE frame takes no memory: there is a hole in the store.
 * VALID-6. What this process has mapped of the store, as the kernel lists it, is PUBLISHED or being looked at by a sweep
 *          (DYING), and some living peer's bit is set.
 * VALID-7. A bitmap is its owner's: magic, id, slot, nonce; its high lies in the store. Of this peer's own: a bit is set
 *          exactly where its private count is not zero (merge lock held).
 * VALID-8. A word of a table lies in a level that is in use and on a page that is marked as touched. An index word names
 *          a frame of the store that is PUBLISHED, or was under the word's generation (INDEX-2). A candidate has a tag.
 *
 * When nobody who lives is in the middle of anything and the dead have been buried (ksm_peer_refresh()), besides:
 *
 * VALID-9. A bit is set for frames that are PUBLISHED only, or DYING_RAW of nobody (SWEEP-3). Nobody is busy with any.
 * VALID-10. Nothing is forgotten: a frame that is not FREE and has no bit, or whose owner is dead, lies in a chunk that
 *          is marked for the sweep.
 *
 * And after that sweep:
 *
 * VALID-11. A frame is FREE, or a bit is set for it. ALLOC and DYING exist no more.
 * VALID-12. Nobody holds the join lock.
 *
 * VALID-5 takes for granted that the kernel gives the store small pages, VALID-8 that no frame was freed a thousand
 * times: then a word ten bits of whose generation agree by chance is not looked at.
 *
 * Called under the merge lock, by the thread that may read the peer's descriptors. A peer that dies meanwhile changes
 * nothing in what is said here. Slow: it reads every published frame.
 */
#include "valid.h"

#include "atomic.h"
#include "error.h"
#include "os.h"
#include "page.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

struct inspection {
	const struct ksm_peer *peer;
	enum ksm_valid_when when;
	uint64_t frames_high;
	uint64_t data_at; /* where data in the store begins at or after the frame looked at last */
	char *why;
	size_t room;
};

KSM_PRINTF(2, 3) static int wrong(struct inspection *in, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(in->why, in->room, format, arguments);
	va_end(arguments);
	return KSM_ECORRUPT;
}

static const char *name_of(enum ksm_cell_state state)
{
	static const char *const names[] = {"FREE", "ALLOC", "PUBLISHED", "DYING", "DYING_RAW"};
	return (size_t)state < KSM_COUNT(names) ? names[state] : "no state at all";
}

/* ---- the whole ------------------------------------------------------------------------------------------ */

static int check_files(struct inspection *in)
{
	const struct ksm_peer *peer = in->peer;
	const struct ksm_control *c = peer->control;
	struct stat control, store;
	uint8_t id[16];
	if (c->magic != KSM_MAGIC || c->version != KSM_LAYOUT_VERSION || c->layout != ksm_layout_hash() ||
	    c->frames != peer->layout.frames)
		return wrong(in, "VALID-1: the header of the control memfd was written over");
	int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	if (ksm_os_stat(peer->fds.control, &control) || (uint64_t)control.st_size != peer->layout.total ||
	    (ksm_os_seals(peer->fds.control) & seals) != seals)
		return wrong(in, "VALID-1: the control memfd has not its size and its seals");
	if (ksm_os_stat(peer->fds.store, &store) || (uint64_t)store.st_size != peer->layout.frames << KSM_PAGE_SHIFT)
		return wrong(in, "VALID-1: the store has not its size");
	if (c->backing == KSM_BACKING_MEMFD && (ksm_os_seals(peer->fds.store) & seals) != seals)
		return wrong(in, "VALID-1: the store is not sealed");
	if (ksm_os_pread(peer->fds.file, id, sizeof(id), offsetof(struct ksm_domain_file, id)) ||
	    memcmp(id, c->id, sizeof(id)))
		return wrong(in, "VALID-1: the domain file is of another domain");
	if (in->frames_high > peer->layout.frames || ksm_load_acquire(&c->slots_high) > KSM_PEERS_MAX)
		return wrong(in, "VALID-2: frames_high or slots_high is out of bounds");
	return 0;
}

static int check_locks(struct inspection *in)
{
	int64_t at = ksm_os_lock_find(in->peer->fds.file, KSM_LOCK_JOIN, 1);
	return at >= 0 ? wrong(in, "VALID-12: somebody holds the join lock") : 0;
}

/* ---- bitmaps ----------------------------------------------------------------------------------------------- */

static int check_bitmap(struct inspection *in, ksm_slotno slot, const struct ksm_bitmap *bitmap, uint64_t nonce)
{
	const struct ksm_peer *peer = in->peer;
	if (bitmap->magic != KSM_MAGIC || bitmap->slot != slot || bitmap->nonce != nonce ||
	    bitmap->frames != peer->layout.frames || memcmp(bitmap->id, peer->control->id, sizeof(bitmap->id)))
		return wrong(in, "VALID-7: the bitmap of slot %u is not what it says", (unsigned)slot);
	if (ksm_load_acquire(&bitmap->high) > peer->layout.frames)
		return wrong(in, "VALID-7: the bitmap of slot %u is valid beyond its end", (unsigned)slot);
	if (in->when >= KSM_VALID_AT_REST && ksm_load_acquire(&bitmap->busy))
		return wrong(in, "VALID-9: slot %u rests, and is busy with frames", (unsigned)slot);
	return 0;
}

static int check_bitmaps(struct inspection *in)
{
	const struct ksm_peer *peer = in->peer;
	int r = 0;
	for (size_t i = 0; !r && i < peer->living_count; i++) {
		const struct ksm_other *other = &peer->others[peer->living[i]];
		if (peer->living[i] == peer->seat.slot)
			r = check_bitmap(in, peer->seat.slot, peer->seat.bitmap, peer->seat.nonce);
		else if (!other->bitmap)
			return -EAGAIN;
		else
			r = check_bitmap(in, peer->living[i], other->bitmap, other->nonce);
	}
	return r;
}

static bool is_living_bit(const struct ksm_peer *peer, ksm_frameno frame)
{
	return ksm_bit_test(peer, frame) || (ksm_bits_of_others(peer, frame & ~63u) >> (frame % 64) & 1);
}

/* ---- cells --------------------------------------------------------------------------------------------------- */

static bool chunk_is_marked(const struct ksm_peer *peer, uint64_t frame)
{
	uint64_t chunk = frame >> KSM_CHUNK_SHIFT;
	return ksm_load_relaxed(&peer->chunks[chunk / 64]) >> (chunk % 64) & 1;
}

/* Is there data in the store? Frames are asked about in ascending order. `now`: not what was read for an earlier one. */
static bool has_data(struct inspection *in, uint64_t frame, bool now)
{
	uint64_t offset = frame << KSM_PAGE_SHIFT;
	if (in->data_at < offset || frame == 0 || now)
		in->data_at = (uint64_t)ksm_os_seek_data(in->peer->fds.store, offset);
	return in->data_at == offset;
}

static int check_owner(struct inspection *in, uint64_t frame, uint64_t cell)
{
	enum ksm_cell_state state = ksm_cell_state(cell);
	ksm_slotno slot = ksm_cell_slot(cell);
	uint32_t epoch = ksm_cell_epoch(cell);
	if (state > KSM_CELL_DYING_RAW)
		return wrong(in, "VALID-3: the cell of frame %llu is in %s", (unsigned long long)frame, name_of(state));
	if (state == KSM_CELL_FREE || state == KSM_CELL_PUBLISHED || slot == KSM_CELL_NOBODY)
		return (slot || epoch) && !(state == KSM_CELL_DYING_RAW && slot == KSM_CELL_NOBODY && !epoch)
			       ? wrong(in, "VALID-3: frame %llu is %s and has an owner (slot %u, epoch %u)",
				       (unsigned long long)frame, name_of(state), (unsigned)slot, (unsigned)epoch)
			       : 0;
	if (slot >= KSM_MIN(ksm_load_acquire(&in->peer->control->slots_high), (uint32_t)KSM_PEERS_MAX))
		return wrong(in, "VALID-3: frame %llu is %s of slot %u, which nobody ever had",
			     (unsigned long long)frame, name_of(state), (unsigned)slot);
	const struct ksm_slot *owner = ksm_peer_slot(in->peer, slot);
	if (!owner)
		return -ENOMEM;
	uint32_t now = ksm_load_acquire(&owner->epoch);
	if (now <= KSM_CELL_EPOCH_MASK && (epoch > now || !epoch))
		return wrong(in, "VALID-3: frame %llu is %s of slot %u in epoch %u, which is only in epoch %u",
			     (unsigned long long)frame, name_of(state), (unsigned)slot, (unsigned)epoch, (unsigned)now);
	return 0;
}

static int check_bytes(struct inspection *in, uint64_t frame, uint64_t cell)
{
	uint64_t bytes[KSM_PAGE_SIZE / sizeof(uint64_t)];
	const struct ksm_peer *peer = in->peer;
	if (ksm_cell_state(cell) == KSM_CELL_FREE) {
		if (has_data(in, frame, false) && has_data(in, frame, true) &&
		    ksm_load_acquire(&peer->cells[frame]) == cell)
			return wrong(in, "VALID-5: frame %llu is FREE, but takes memory", (unsigned long long)frame);
	} else if (ksm_cell_state(cell) == KSM_CELL_PUBLISHED) {
		uint32_t check = ksm_load_acquire(&peer->checks[frame]);
		bool good = has_data(in, frame, true) &&
			    !ksm_os_pread(peer->fds.store, bytes, sizeof(bytes), frame << KSM_PAGE_SHIFT) &&
			    (uint32_t)(ksm_page_digest(bytes) >> KSM_DIGEST_CHECK_SHIFT) == check;
		if (!good && ksm_load_acquire(&peer->cells[frame]) == cell)
			return wrong(in, "VALID-4: frame %llu is PUBLISHED without its bytes",
				     (unsigned long long)frame);
	}
	return 0;
}

/* What must hold when everybody rests. */
static int check_rest(struct inspection *in, uint64_t frame, uint64_t cell)
{
	const struct ksm_peer *peer = in->peer;
	enum ksm_cell_state state = ksm_cell_state(cell);
	bool referred = is_living_bit(peer, (ksm_frameno)frame);
	bool spared = state == KSM_CELL_DYING_RAW && ksm_cell_slot(cell) == KSM_CELL_NOBODY;
	bool dead = state != KSM_CELL_FREE && state != KSM_CELL_PUBLISHED && !spared &&
		    !ksm_peer_is_living(peer, ksm_cell_slot(cell), ksm_cell_epoch(cell));
	if (referred && state != KSM_CELL_PUBLISHED && !spared && !dead)
		return wrong(in, "VALID-9: somebody refers to frame %llu, which is %s", (unsigned long long)frame,
			     name_of(state));
	if (state == KSM_CELL_FREE || ksm_load_acquire(&peer->control->no_sweep) ||
	    (referred && state == KSM_CELL_PUBLISHED))
		return 0;
	if (in->when == KSM_VALID_SWEPT && !(referred && spared))
		return wrong(in, "VALID-11: frame %llu is %s after a sweep, and %s refers to it",
			     (unsigned long long)frame, name_of(state), referred ? "somebody" : "nobody");
	if (!chunk_is_marked(peer, frame))
		return wrong(in, "VALID-10: frame %llu is %s, nobody refers to it, and no sweep is due",
			     (unsigned long long)frame, name_of(state));
	return 0;
}

static int check_frame(struct inspection *in, uint64_t frame)
{
	const struct ksm_peer *peer = in->peer;
	uint64_t cell = ksm_load_acquire(&peer->cells[frame]);
	bool bit = ksm_bit_test(peer, (ksm_frameno)frame);
	if (ksm_cell_state(cell) != KSM_CELL_FREE && frame >= ksm_load_acquire(&peer->control->frames_high))
		return wrong(in, "VALID-2: frame %llu is %s beyond frames_high", (unsigned long long)frame,
			     name_of(ksm_cell_state(cell)));
	if (bit != (peer->counts[frame] != 0))
		return wrong(in, "VALID-7: our bit of frame %llu is %d, but %u pages of ours refer to it",
			     (unsigned long long)frame, bit, (unsigned)peer->counts[frame]);
	int r = check_owner(in, frame, cell);
	if (!r)
		r = check_bytes(in, frame, cell);
	if (!r && in->when >= KSM_VALID_AT_REST)
		r = check_rest(in, frame, cell);
	return r;
}

/* Cells that nobody ever touched are not read: that would allocate them. */
static int check_cells(struct inspection *in)
{
	const struct ksm_peer *peer = in->peer;
	uint64_t per_page = KSM_PAGE_SIZE / sizeof(uint64_t), frame = 0;
	int r = 0;
	while (!r && frame < peer->layout.frames) {
		uint64_t at = peer->layout.cells + frame * sizeof(uint64_t);
		uint64_t data = (uint64_t)ksm_os_seek_data(peer->fds.control, at);
		if (data > at)
			frame = (KSM_MIN(data, peer->layout.checks) - peer->layout.cells) / sizeof(uint64_t);
		uint64_t end = KSM_MIN((frame / per_page + 1) * per_page, peer->layout.frames);
		for (; !r && frame < end; frame++)
			r = check_frame(in, frame);
	}
	return r;
}

/* ---- mappings -------------------------------------------------------------------------------------------------- */

static int check_mapping(struct inspection *in, uint64_t first, uint64_t count)
{
	const struct ksm_peer *peer = in->peer;
	for (uint64_t frame = first; frame < first + count; frame++) {
		enum ksm_cell_state state = ksm_cell_state(ksm_load_acquire(&peer->cells[frame]));
		if (frame >= peer->layout.frames || !is_living_bit(peer, (ksm_frameno)frame))
			return wrong(in, "VALID-6: frame %llu is mapped, and nobody's bit is set",
				     (unsigned long long)frame);
		if (state == KSM_CELL_FREE || state == KSM_CELL_ALLOC)
			return wrong(in, "VALID-6: frame %llu is mapped, and %s", (unsigned long long)frame,
				     name_of(state));
	}
	return 0;
}

static int check_mappings(struct inspection *in)
{
	struct stat store;
	char line[512];
	int r = ksm_os_stat(in->peer->fds.store, &store);
	FILE *maps = r ? NULL : fopen("/proc/self/maps", "re");
	if (!maps)
		return r ? r : -errno;
	while (!r && fgets(line, sizeof(line), maps)) {
		unsigned long from, to, offset, inode;
		unsigned major, minor;
		if (sscanf(line, "%lx-%lx %*s %lx %x:%x %lu", &from, &to, &offset, &major, &minor, &inode) == 6 &&
		    inode == store.st_ino && makedev(major, minor) == store.st_dev)
			r = check_mapping(in, offset >> KSM_PAGE_SHIFT, (to - from) >> KSM_PAGE_SHIFT);
	}
	fclose(maps);
	return r;
}

/* ---- tables ---------------------------------------------------------------------------------------------------- */

static int check_table(struct inspection *in, const struct ksm_table *table, const char *name,
		       bool (*is_right)(const struct ksm_peer *peer, uint64_t word))
{
	uint32_t levels = ksm_load_acquire(table->levels_now);
	if (levels < 1 || levels > table->levels_max)
		return wrong(in, "VALID-2: the %s has %u levels of %u", name, (unsigned)levels, table->levels_max);
	uint64_t words = ksm_table_words(table->levels_max);
	uint64_t base = (uint64_t)((const char *)table->words - (const char *)in->peer->control);
	for (uint64_t i = 0; i < words; i++) {
		uint64_t at = base + i * sizeof(uint64_t), page = i / (KSM_PAGE_SIZE / sizeof(uint64_t));
		if (i % (KSM_PAGE_SIZE / sizeof(uint64_t)) == 0) { /* reading what nobody wrote would allocate it */
			uint64_t data = (uint64_t)ksm_os_seek_data(in->peer->fds.control, at);
			if (data > at) {
				i = KSM_MIN((data - base) / sizeof(uint64_t), words) - 1;
				continue;
			}
		}
		uint64_t word = ksm_load_acquire(&table->words[i]);
		if (!word)
			continue;
		if (i >= ksm_table_words(ksm_table_levels(table)))
			return wrong(in, "VALID-8: word %llu of the %s lies in a level that is not in use",
				     (unsigned long long)i, name);
		if (!(ksm_load_acquire(&table->touched[page / 64]) >> (page % 64) & 1))
			return wrong(in, "VALID-8: word %llu of the %s lies on a page that nobody touched",
				     (unsigned long long)i, name);
		if (!is_right(in->peer, word))
			return wrong(in, "VALID-8: word %llu of the %s, %016llx, promises what never was",
				     (unsigned long long)i, name, (unsigned long long)word);
	}
	return 0;
}

static int check_tables(struct inspection *in)
{
	struct ksm_index index;
	ksm_index_attach(&index, in->peer);
	int r = check_table(in, &index.frames, "index", ksm_index_word_is_valid);
	return r ? r : check_table(in, &index.candidates, "candidates", ksm_candidate_word_is_valid);
}

int ksm_domain_is_valid(const struct ksm_peer *peer, enum ksm_valid_when when, char *why, size_t room)
{
	struct inspection in = {.peer = peer, .when = when, .why = why, .room = room};
	in.frames_high = ksm_load_acquire(&peer->control->frames_high);
	if (!peer->living_known)
		return -EAGAIN;
	int r = check_files(&in);
	if (!r)
		r = check_bitmaps(&in);
	if (!r)
		r = check_cells(&in);
	if (!r)
		r = check_mappings(&in);
	if (!r)
		r = check_tables(&in);
	if (!r && when == KSM_VALID_SWEPT)
		r = check_locks(&in);
	return r;
}
