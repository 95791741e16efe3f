/* SPDX-License-Identifier: MIT */
/*
 * DOC: Headroom
 *
 * A frame is memory charged to the control group of whoever writes it. At the group's limit the kernel does not refuse
 * such a write, it kills a process of the group. So whoever is about to use more memory than it gives back asks here
 * first: how far are our group, and the groups above it, from their limits?
 *
 *    room of a group    limit - usage; if that is not plenty: + what the kernel can take back without killing anybody, that
 *                       is the page cache of files, and swap as far as the group may use it
 *    headroom           the least room of all groups from ours up to the root
 *
 * Version 1 may limit memory and swap together as well: then a page that goes to swap makes no room under that limit, and
 * the lesser of both rooms counts.
 *
 * Both versions of control groups are understood, at their usual places. What cannot be read counts as no limit: then the
 * kernel does what it would have done without us.
 *
 * HEADROOM-1. Nothing is looked at unless somebody asks; while there is plenty, limits are read at most every
 *             LIMITS_EVERY_NS and usage after a quarter of the room has been used or ROOM_EVERY_NS have passed.
 * HEADROOM-2. Once there is too little, there must be clearly more than enough before the answer changes.
 * HEADROOM-3. The answer is advice. Between it and the use of the memory others may use it; `spare` is what allows for
 *             them.
 *
 * Called by the scanner's thread. No descriptor is kept, so a fork or a death leaves nothing to mend.
 */
#include "headroom.h"

#include "error.h"
#include "os.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MS 1000000ull
#define LIMITS_EVERY_NS (500 * MS)
#define ROOM_EVERY_NS (5 * MS)
#define STAT_ROOM 8192
#define NO_LIMIT ((uint64_t)1 << 60) /* version 1 says a huge number where there is none */

void ksm_headroom_init(struct ksm_headroom *headroom, const char *root, const char *membership)
{
	memset(headroom, 0, sizeof(*headroom));
	headroom->root = root ? root : "/sys/fs/cgroup";
	headroom->membership = membership ? membership : "/proc/self/cgroup";
	headroom->meminfo = "/proc/meminfo";
}

/* ---- files of a group --------------------------------------------------------------------------------------- */

/* A file of the group whose directory is the first `length` bytes of the path. Its length, or an error. */
static int read_of(const struct ksm_headroom *headroom, size_t length, const char *file, char *text, size_t room)
{
	char path[KSM_HEADROOM_PATH + 64];
	snprintf(path, sizeof(path), "%.*s/%s", (int)length, headroom->path, file);
	return ksm_os_read_file(AT_FDCWD, path, text, room);
}

/* A number in a file; UINT64_MAX: "max", or it cannot be read. */
static uint64_t number_of(const struct ksm_headroom *headroom, size_t length, const char *file)
{
	char text[32], *end;
	if (read_of(headroom, length, file, text, sizeof(text)) <= 0)
		return UINT64_MAX;
	uint64_t number = strtoull(text, &end, 10);
	return end == text || number >= NO_LIMIT ? UINT64_MAX : number;
}

/* The number after a key at the beginning of a line; 0: there is none. */
static uint64_t field_of(const char *text, const char *key)
{
	size_t n = strlen(key);
	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, key, n))
			return strtoull(line + n, NULL, 10);
	}
	return 0;
}

/* ---- which groups -------------------------------------------------------------------------------------------- */

/* Of a line "number:controllers:path": the path if it is the group we are charged to. */
static const char *path_in(char *line, bool unified)
{
	char *names = strchr(line, ':');
	char *path = names ? strchr(names + 1, ':') : NULL;
	if (!path)
		return NULL;
	*names++ = *path++ = 0;
	if (unified)
		return *names == 0 ? path : NULL;
	for (char *rest = names, *name; (name = strsep(&rest, ","));)
		if (!strcmp(name, "memory"))
			return path;
	return NULL;
}

/* Set the path to our group's directory, if it is there, else to where the hierarchy begins: a container may see itself
 * there. */
static bool try_group(struct ksm_headroom *headroom, char *membership, bool unified)
{
	const char *there = unified ? "cgroup.controllers" : "memory.usage_in_bytes";
	const char *below = unified ? "" : "/memory", *group = NULL;
	char text[256];
	for (char *rest = membership, *line; !group && (line = strsep(&rest, "\n"));)
		group = path_in(line, unified);
	if (!group)
		return false;
	headroom->unified = unified;
	for (int attempt = 0; attempt < 2; attempt++) {
		int n = snprintf(headroom->path, sizeof(headroom->path), "%s%s%s", headroom->root, below,
				 attempt || !strcmp(group, "/") ? "" : group);
		if (n > 0 && (size_t)n < sizeof(headroom->path) &&
		    read_of(headroom, (size_t)n, there, text, sizeof(text)) >= 0)
			return true;
	}
	return false;
}

static bool find_group(struct ksm_headroom *headroom)
{
	char text[4096], again[4096];
	if (ksm_os_read_file(AT_FDCWD, headroom->membership, text, sizeof(text)) <= 0)
		return false;
	memcpy(again, text, sizeof(again));
	return try_group(headroom, text, false) || try_group(headroom, again, true);
}

/* The groups with a limit, from ours up to where the hierarchy begins. */
static void find_limits(struct ksm_headroom *headroom)
{
	const char *limit = headroom->unified ? "memory.max" : "memory.limit_in_bytes";
	size_t top = strlen(headroom->root) + (headroom->unified ? 0 : strlen("/memory"));
	size_t length = strlen(headroom->path);
	headroom->count = 0;
	while (length >= top && headroom->count < KSM_HEADROOM_LEVELS) {
		uint64_t bytes = number_of(headroom, length, limit);
		if (bytes != UINT64_MAX) {
			headroom->levels[headroom->count] = length;
			headroom->both[headroom->count] =
				headroom->unified ? UINT64_MAX
						  : number_of(headroom, length, "memory.memsw.limit_in_bytes");
			headroom->limits[headroom->count++] = bytes;
		}
		if (length == top)
			break;
		while (length > top && headroom->path[--length] != '/')
			;
	}
}

/* ---- room ------------------------------------------------------------------------------------------------------- */

/* What of a group's memory could go to swap. */
static uint64_t swap_room(const struct ksm_headroom *headroom, size_t length)
{
	char text[STAT_ROOM];
	if (ksm_os_read_file(AT_FDCWD, headroom->meminfo, text, sizeof(text)) <= 0)
		return 0;
	uint64_t most = field_of(text, "SwapFree:") * 1024;
	if (!most)
		return 0;
	if (!headroom->unified) /* a limit of memory and swap together is looked at by itself */
		return number_of(headroom, length, "memory.swappiness") == 0 ? 0 : most;
	uint64_t limit = number_of(headroom, length, "memory.swap.max");
	uint64_t used = number_of(headroom, length, "memory.swap.current");
	if (limit == UINT64_MAX)
		return most;
	return used < limit ? KSM_MIN(most, limit - used) : 0;
}

/* Page cache, which the kernel drops or writes back before it kills. */
static uint64_t cache_of(const struct ksm_headroom *headroom, size_t length)
{
	char text[STAT_ROOM];
	if (read_of(headroom, length, "memory.stat", text, sizeof(text)) <= 0)
		return 0;
	if (headroom->unified)
		return field_of(text, "inactive_file ") + field_of(text, "active_file ");
	return field_of(text, "total_inactive_file ") + field_of(text, "total_active_file ");
}

/* What a limit leaves if `back` bytes can be taken back. No limit, or nobody knows what is used: no bound. */
static uint64_t left_of(uint64_t limit, uint64_t used, uint64_t back)
{
	if (limit == UINT64_MAX || used == UINT64_MAX)
		return UINT64_MAX;
	return limit + back > used ? limit + back - used : 0;
}

static uint64_t room_of(const struct ksm_headroom *headroom, size_t level, uint64_t plenty)
{
	size_t length = headroom->levels[level];
	uint64_t limit = headroom->limits[level], both = headroom->both[level], both_used = 0;
	uint64_t used = number_of(headroom, length, headroom->unified ? "memory.current" : "memory.usage_in_bytes");
	if (both != UINT64_MAX)
		both_used = number_of(headroom, length, "memory.memsw.usage_in_bytes");
	uint64_t room = KSM_MIN(left_of(limit, used, 0), left_of(both, both_used, 0));
	if (room >= plenty)
		return room;
	uint64_t cache = KSM_MIN(cache_of(headroom, length), used);
	return KSM_MIN(left_of(limit, used, cache + swap_room(headroom, length)), left_of(both, both_used, cache));
}

/* Look, if what is known is too old. Exact below `plenty` bytes. */
static void look(struct ksm_headroom *headroom, uint64_t now, uint64_t plenty)
{
	if (!headroom->found_ns || now - headroom->found_ns > LIMITS_EVERY_NS) {
		headroom->found_ns = now;
		headroom->count = 0;
		if (find_group(headroom))
			find_limits(headroom);
	}
	headroom->looked_ns = now;
	headroom->room = UINT64_MAX;
	for (size_t i = 0; i < headroom->count; i++)
		headroom->room = KSM_MIN(headroom->room, room_of(headroom, i, plenty));
}

int ksm_headroom_check(struct ksm_headroom *headroom, uint64_t nbytes, uint64_t spare)
{
	uint64_t now = ksm_os_now_ns(), needed = nbytes + spare;
	if (headroom->short_of)
		needed += KSM_MAX(spare, nbytes); /* HEADROOM-2 */
	bool fresh = headroom->found_ns && now - headroom->found_ns <= LIMITS_EVERY_NS &&
		     (headroom->count == 0 || now - headroom->looked_ns <= ROOM_EVERY_NS);
	if (!fresh || (headroom->credit < nbytes && !headroom->short_of)) {
		look(headroom, now, 4 * needed);
		headroom->short_of = headroom->room < needed;
		headroom->credit = headroom->short_of ? 0 : KSM_MAX((headroom->room - spare) / 4, nbytes);
	}
	if (headroom->short_of)
		return KSM_EHEADROOM;
	headroom->credit -= KSM_MIN(headroom->credit, headroom->room == UINT64_MAX ? 0 : nbytes);
	return 0;
}

uint64_t ksm_headroom_now(struct ksm_headroom *headroom)
{
	headroom->found_ns = 0;
	look(headroom, ksm_os_now_ns(), UINT64_MAX / 2);
	return headroom->room;
}
