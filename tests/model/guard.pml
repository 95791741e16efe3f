/* SPDX-License-Identifier: MIT */
/*
 * guard.pml: one page that we make read-only, those who store into it, and those who change its mapping.
 *
 * DOC
 * A guard keeps one byte for the page: OPEN, READONLY, MERGED, WRITABLE or BUSY, and FROZEN beside it. A store
 * into a page that is read-only faults, and the SIGSEGV handler of its thread does the work. The protocol is that
 * of csrc/guard.c, cow.c, freeze.c, restore.c, merge_window.c (map_run) and barrier_segv.c:
 *
 * store     writable: it is done (and the kernel copies a page of a frame). Read-only, the byte MERGED or READONLY:
 *           claim it from exactly what was seen to BUSY. MERGED: copy, move the copy over the page, count, OPEN; or,
 *           if there is no room, make it writable, WRITABLE. READONLY: make it writable, OPEN. If that fails: what
 *           it was. Anything else: again.
 * merge     under the merge lock: take a frame with the page's bytes; open a window; compare; BUSY; map; MERGED or
 *           WRITABLE; close. Windows: "move", stores sleep; "stop", nobody runs; "segv", and of frozen pages always:
 *           claim, make it read-only, compare, map, or else give back.
 * freeze, thaw, make private, restore, free
 *           under the merge lock. An OPEN or WRITABLE page is its holder's without a claim; a BUSY one is waited for.
 * open all  without the merge lock: claim MERGED or READONLY, make it writable, WRITABLE or OPEN.
 * fork      under the merge lock. In the child there is one thread; a BUSY page becomes writable, WRITABLE.
 *
 * LOST      No store is lost: the page holds all that was stored.
 * GUARD-1   While a page is read-only and anybody runs, its byte says BUSY, MERGED or READONLY. So no store is taken
 *           for somebody else's: one that faults and finds OPEN or WRITABLE can be done.
 * CERTAIN   While a byte says MERGED or READONLY (and the merge lock is free) the page is read-only; if MERGED, it
 *           maps the frame and nobody has written it since. (Where calls fail, the last half is not asked.)
 * GUARD-2   `busy` is never less than the number of BUSY pages, and zero at the end.
 * REFS      While the mapping refers to a frame the reference is held. (So a process may be killed at every step:
 *           its mappings go first, its bits are swept afterwards; that side is frames.pml.)
 * BREAKS    Every break is counted once: by the handler, or by whoever sees that the kernel has copied.
 * ENDS      Every store ends, and whoever waits for a BUSY page. To wait is to sleep until something can be done;
 *           so what would be tried for ever is a deadlock here. And no path is endless.
 *
 * Sequential consistency. CONFIG is one of those below, the bits of MUTANTS break one rule each; check.py knows
 * all.
 */

/* What opens windows, and whether merged pages are read-only (else the kernel copies). */
#define MOVE         1
#define STOP         2
#define SEGV         3
#define MOVE_KERNEL  4
/* Beside "move" and read-only pages: */
#define OPENER       5	/* everything is opened while the rest goes on; the page is freed */
#define FORK         6	/* a child is born */
#define FAILURES     7	/* calls fail; with "segv" */

/* The verifier asks its environment for both, so that one build serves all. */
#ifndef CONFIG
#define CONFIG MOVE
#endif
#ifndef MUTANTS
#define MUTANTS 0
#endif
hidden int config = CONFIG;
hidden int mutants = MUTANTS;
#define MUTANT(n)  ((mutants >> (n)) & 1)

#define BY_SEGV  (config == SEGV || config == FAILURES)
#define BY_STOP  (config == STOP)
#define BY_MOVE  (!BY_SEGV && !BY_STOP)
#define SIGSEGV  (config != MOVE_KERNEL)	/* merged pages are read-only */

#ifdef WITNESS
c_decl {
	static unsigned witnesses;
	static void print_witnesses(void) { printf("witnesses %u\n", witnesses); }
}
#define W(n)  c_code { witnesses |= 1u << n; }
#else
#define W(n)  skip
#endif
#define W_MERGED    1	/* a page mapped to a frame */
#define W_FROZEN    2	/* … in a window of frozen pages */
#define W_UNEQUAL   3	/* a store came between the look and the window */
#define W_COPIED    4	/* by a handler */
#define W_OPENED    5	/* a merged page made writable by a handler */
#define W_THAWED    6	/* a frozen page made writable by a handler */
#define W_QUICKER   7	/* a claim that came too late */
#define W_RESTORED  8	/* a merged page private again */
#define W_KERNEL    9	/* the kernel copied */
#define W_ORPHAN   10	/* a BUSY page of a child */
#define W_ALL      11	/* opened with all others */
#define W_BACK     12	/* a way back that failed */
#define W_END      13	/* all have ended */

/* Rules to be broken. */
#define M_MAP_WHILE_OPEN       MUTANT(1)
#define M_SAY_MERGED_LATE      MUTANT(2)
#define M_NO_CLAIM             MUTANT(3)
#define M_CLAIM_ANYTHING       MUTANT(4)
#define M_CLAIM_IN_TWO_STEPS   MUTANT(5)
#define M_OPEN_BEFORE_COPY     MUTANT(6)
#define M_COPY_BEFORE_CLAIM    MUTANT(7)
#define M_COUNT_BUSY_LATE      MUTANT(8)
#define M_SEGV_NO_CLAIM        MUTANT(9)
#define M_SEGV_NO_PROTECT      MUTANT(10)
#define M_SEGV_SET_FIRST       MUTANT(11)
#define M_NO_COMPARE           MUTANT(12)
#define M_FREEZE_OPEN          MUTANT(13)
#define M_FREEZE_BROKEN        MUTANT(14)
#define M_RESTORE_BUSY         MUTANT(15)
#define M_RESTORE_COUNTS       MUTANT(16)
#define M_RESTORE_NO_CLAIM     MUTANT(17)
#define M_PUT_FIRST            MUTANT(18)
#define M_FORGET_EARLY         MUTANT(19)
#define M_FREE_NO_CLAIM        MUTANT(20)
#define M_OPEN_ALL_NO_CLAIM    MUTANT(21)
#define M_OPEN_ALL_SAYS_OPEN   MUTANT(22)
#define M_ORPHAN_STAYS         MUTANT(23)
#define M_ORPHAN_SAYS_OPEN     MUTANT(24)
#define M_FORK_KEEPS_BUSY      MUTANT(25)
#define M_WAY_BACK_IGNORED     MUTANT(26)
#define M_THAW_HALF_WAY        MUTANT(27)
#define M_FORK_UNLOCKED        MUTANT(28)
#define M_STAYS_BUSY           MUTANT(29)

/* ---- the page --------------------------------------------------------------------------------------- */

#define OPEN      0
#define READONLY  1
#define MERGED    2
#define WRITABLE  3
#define BUSY      4

byte guard = OPEN;
bool frozen;
byte busy;

bool writable = 1;		/* its protection */
bool framed, copied;		/* the mapping is a frame's; the kernel has copied it for a store */
byte content;			/* the set of stores that it holds */
bool away;			/* out, in a window of "move": stores sleep */
bool parked;			/* nobody runs, in a window of "stop" */
byte handling;			/* threads in the handler: they are waited for before a stop */

#define KNOWN_PRIVATE  0
#define KNOWN_MERGED   1
#define KNOWN_BROKEN   2
byte word;			/* what the scanner knows */
bool reference;
bool lock;			/* the merge lock */

byte breaks;			/* counted by the handler */
byte counted;			/* … by others */

/* ---- ghosts ------------------------------------------------------------------------------------------- */

byte done;			/* the set of stores that have been made */
byte broken;			/* copies by the handler, and by the kernel */
byte broken_here;		/* by the handler alone */
byte todo;			/* threads that have not ended */
byte failures;			/* calls that may still fail */
bool forked;
byte which;			/* the invariant that does not hold */

#define IS_READ_ONLY(g)  ((g) == MERGED || (g) == READONLY)
#define CAN_STORE        (!away && !parked)

#define BAD(n)  which = n; assert(which != n)

#define CALLS_WORK  (config != FAILURES && config != OPENER)

proctype Monitor() {
end:	if
	:: atomic { content != done -> BAD(1) }
	:: atomic { !writable && !IS_READ_ONLY(guard) && guard != BUSY && !parked -> BAD(2) }
	:: atomic { IS_READ_ONLY(guard) && writable && !lock -> BAD(3) }
	:: atomic { guard == MERGED && !(framed && !copied) && !lock && CALLS_WORK -> BAD(3) }
	:: atomic { guard == BUSY && busy == 0 -> BAD(4) }
	:: atomic { framed && !reference -> BAD(5) }
	:: atomic { !forked && breaks + counted > broken -> BAD(6) }
	fi
}

/* ---- claims ------------------------------------------------------------------------------------------- */

/*
 * `busy` grows before a byte becomes BUSY and shrinks after it has become something else. Here it does so in the
 * same step: that it is too high for a moment concerns nobody but who takes a guard down.
 */
inline become(g, f) {
	if
	:: guard != BUSY && g == BUSY -> busy = busy + 1
	:: guard == BUSY && g != BUSY -> assert(busy > 0); busy = busy - 1
	:: else
	fi;
	guard = g; frozen = f
}

/* ksm_guard_set() */
inline set(g, f) { atomic { become(g, f) } }

#define CLAIM_IS_WRONG  (M_NO_CLAIM || M_CLAIM_IN_TWO_STEPS || M_CLAIM_ANYTHING || M_COUNT_BUSY_LATE)

/* From exactly what was seen, in one step; ok: claimed. */
inline claim_from(g, f, ok) {
	if
	:: atomic {
		!CLAIM_IS_WRONG ->
		if
		:: guard == g && frozen == f -> become(BUSY, f); ok = 1
		:: else -> W(W_QUICKER); ok = 0
		fi
	   }
	:: atomic { M_NO_CLAIM -> become(BUSY, frozen); ok = 1 }
	:: M_CLAIM_IN_TWO_STEPS && guard == g && frozen == f -> atomic { become(BUSY, f); ok = 1 }
	:: atomic { M_CLAIM_IN_TWO_STEPS && !(guard == g && frozen == f) -> ok = 0 }
	:: atomic {	/* whatever it says by now, and put it back */
		M_CLAIM_ANYTHING ->
		if
		:: guard == g && frozen == f && g != BUSY -> become(BUSY, f); ok = 1
		:: guard != BUSY && !(guard == g && frozen == f) -> g = guard; f = frozen; become(BUSY, f); taken = 1
		:: else -> ok = 0
		fi
	   };
	   if
	   :: taken -> atomic { become(g, f); taken = 0; ok = 0 }
	   :: else
	   fi
	:: atomic {
		M_COUNT_BUSY_LATE ->
		if
		:: guard == g && frozen == f -> guard = BUSY; ok = 1
		:: else -> ok = 0
		fi
	   };
	   if
	   :: ok -> busy = busy + 1
	   :: else
	   fi
	fi
}

/* ---- calls -------------------------------------------------------------------------------------------- */

/* bad: it failed, and changed nothing; or, of a run of pages, this one. */
inline protect(w) {
	atomic {
		if
		:: writable = w; bad = 0
		:: failures > 0 && writable != w -> failures = failures - 1; bad = 1
		fi
	}
}

inline copy_over(w) {
	atomic { fresh = content };
	atomic {
		content = fresh; fresh = 0; framed = 0; copied = 0; writable = w
	}
}

/* ---- in threads of the program ------------------------------------------------------------------------ */

inline store(mine) {
	content = content | mine; done = done | mine;
	if
	:: framed && !copied -> copied = 1; broken = broken + 1; W(W_KERNEL)
	:: else
	fi
}

inline open_merged() {
	if
	:: true ->
		if
		:: M_OPEN_BEFORE_COPY -> set(OPEN, 0)
		:: else
		fi;
		if
		:: !M_COPY_BEFORE_CLAIM -> copy_over(1)
		:: else -> atomic { content = fresh; framed = 0; copied = 0; writable = 1; fresh = 0 }
		fi;
		atomic {
			broken = broken + 1; broken_here = broken_here + 1; breaks = breaks + 1; W(W_COPIED)
		};
		if
		:: !M_OPEN_BEFORE_COPY -> set(OPEN, 0)
		:: else
		fi
	:: true ->			/* no room for another mapping, no memory */
		protect(1);
		if
		:: bad && M_STAYS_BUSY -> bad = 0
		:: bad && !M_STAYS_BUSY -> bad = 0; set(seen, seen_frozen)
		:: else -> W(W_OPENED); set(WRITABLE, 0)
		fi
	fi
}

inline fault() {
	if
	:: M_COPY_BEFORE_CLAIM -> fresh = content
	:: else
	fi;
	claim_from(seen, seen_frozen, ok);
	if
	:: ok && seen == MERGED -> open_merged()
	:: ok && seen == READONLY ->
		protect(1);
		if
		:: bad -> bad = 0; set(seen, seen_frozen)
		:: else -> W(W_THAWED); set(OPEN, 0)
		fi
	:: else
	fi;
	atomic { ok = 0; seen = 0; seen_frozen = 0; fresh = 0; handling = handling - 1 }
}

/* After a fork the child is looked at, in which these threads do not exist. */
#define BEGIN  {
#define END    } unless { forked && !born }; todo = todo - 1

/* A store faults; the handler looks at the byte. Where there is nothing to be done it would come again. */
inline store_until_done(mine) {
	do
	:: atomic { writable && CAN_STORE -> store(mine) }; break
	:: atomic {
		!writable && CAN_STORE && (IS_READ_ONLY(guard) || (M_CLAIM_ANYTHING && guard == BUSY)) ->
		seen = guard; seen_frozen = frozen; handling = handling + 1
	   };
	   fault()
	od
}

proctype Thread(byte mine; bool born) {
	bool ok, bad, taken, seen_frozen;
	byte seen, fresh;
	BEGIN
		store_until_done(mine)
	END
}

/* Without the merge lock: ksm_guards_open_all(). */
proctype Opener() {
	bool born, ok, bad, taken, seen_frozen;
	byte seen;
	BEGIN
		atomic {
			if
			:: IS_READ_ONLY(guard) -> seen = guard; seen_frozen = frozen
			:: true -> seen = OPEN
			fi
		};
		if
		:: seen == OPEN
		:: seen != OPEN && M_OPEN_ALL_NO_CLAIM ->
			writable = 1;
			atomic { guard = (seen == MERGED -> WRITABLE : OPEN); frozen = 0 }
		:: else ->
			claim_from(seen, seen_frozen, ok);
			if
			:: ok ->
				protect(1);
				if
				:: bad ->	/* the way back, which does not fail; then what it said */
					atomic { bad = 0; writable = 0 };
					set(seen, seen_frozen)
				:: else ->
					W(W_ALL);
					if
					:: seen == MERGED && !M_OPEN_ALL_SAYS_OPEN -> set(WRITABLE, 0)
					:: else -> set(OPEN, 0)
					fi
				fi
			:: else
			fi
		fi
	END
}

/* ---- under the merge lock ----------------------------------------------------------------------------- */

inline put() { reference = 0; word = KNOWN_PRIVATE }
inline forget() { atomic { put() } }

/* Whoever holds the merge lock waits for what others hold. */
inline claim_settled() {
	do
	:: atomic { guard != BUSY -> seen = guard; seen_frozen = frozen };
	   claim_from(seen, seen_frozen, ok);
	   if
	   :: ok -> ok = 0; break
	   :: else
	   fi
	od
}

/* The scanner looks: what has become of a merged page? */
inline look() {
	if
	:: atomic { word != KNOWN_PRIVATE && guard == OPEN -> put() }
	:: atomic { word == KNOWN_MERGED && guard == WRITABLE && copied -> word = KNOWN_BROKEN; counted = counted + 1 }
	:: else
	fi
}

/* In place of the comparison that was begun: map, and say so. `kept`: what the guard said before. */
inline map_run(read_only, f) {
	atomic { seen = guard; seen_frozen = frozen };
	if
	:: !read_only || M_MAP_WHILE_OPEN || M_SAY_MERGED_LATE
	:: else -> set(BUSY, 0)
	fi;
	if
	:: true ->
		atomic {
			framed = 1; copied = 0; content = bytes; away = 0; W(W_MERGED);
			if
			:: read_only -> writable = 0
			:: else
			fi
		};
		if
		:: M_SAY_MERGED_LATE -> parked = 0
		:: else
		fi;
		if
		:: read_only -> set(MERGED, f)
		:: else -> set(WRITABLE, 0)
		fi;
		word = KNOWN_MERGED
	:: failures > 0 -> failures = failures - 1; set(seen, seen_frozen); forget()
	fi
}

inline merge_moving() {
	atomic { !framed && !frozen && (guard == OPEN || guard == WRITABLE) -> away = 1 };
	if
	:: content == bytes || M_NO_COMPARE -> map_run(SIGSEGV, 0)
	:: else -> W(W_UNEQUAL); forget()
	fi;
	away = 0
}

inline merge_stopped() {
	atomic { handling == 0 -> parked = 1 };
	if
	:: !frozen && !framed && (guard == OPEN || guard == WRITABLE) && (content == bytes || M_NO_COMPARE) ->
		map_run(SIGSEGV, 0)
	:: else -> W(W_UNEQUAL); forget()
	fi;
	parked = 0
}

/* frozen_only: the window of frozen pages. */
inline merge_guarded(frozen_only) {
	atomic { seen = guard; seen_frozen = frozen };
	if
	:: seen == BUSY || seen == MERGED || (frozen_only && !(seen == READONLY && seen_frozen)) -> forget()
	:: else ->
		if
		:: M_SEGV_NO_CLAIM -> ok = 1
		:: else -> claim_from(seen, seen_frozen, ok)
		fi;
		if
		:: ok -> ok = 0; compare_guarded()
		:: else -> forget()
		fi
	fi
}

inline compare_guarded() {
	bad = 0;
	if
	:: seen != READONLY && !M_SEGV_NO_PROTECT -> protect(0)
	:: else
	fi;
	if
	:: !bad && (content == bytes || M_NO_COMPARE) ->
		if
		:: frozen -> W(W_FROZEN)
		:: else
		fi;
		atomic {
			framed = 1; copied = 0; content = bytes; W(W_MERGED);
			writable = !(SIGSEGV || frozen)
		};
		if
		:: SIGSEGV || seen_frozen -> set(MERGED, seen_frozen)
		:: else -> set(WRITABLE, 0)
		fi;
		word = KNOWN_MERGED
	:: bad || content != bytes || failures > 0 ->
		if
		:: content != bytes -> W(W_UNEQUAL)
		:: else
		fi;
		bad = 0;
		if
		:: M_SEGV_SET_FIRST -> set(seen, seen_frozen)
		:: else
		fi;
		if
		:: seen != READONLY -> protect(1)
		:: else
		fi;
		if
		:: bad && !M_WAY_BACK_IGNORED -> W(W_BACK); bad = 0; set(READONLY, 0)
		:: M_SEGV_SET_FIRST -> bad = 0
		:: else -> bad = 0; set(seen, seen_frozen)
		fi;
		forget()
	fi
}

inline merge() {
	look();
	if
	:: word == KNOWN_PRIVATE ->
		atomic { reference = 1; bytes = content };
		if
		:: frozen -> merge_guarded(1)
		:: !frozen && framed -> forget()
		:: else ->
			if
			:: BY_MOVE && (guard == OPEN || guard == WRITABLE) -> merge_moving()
			:: BY_MOVE && guard != OPEN && guard != WRITABLE -> forget()
			:: BY_STOP -> merge_stopped()
			:: BY_SEGV -> merge_guarded(0)
			fi
		fi;
		bytes = 0
	:: else
	fi
}

/* One page: the kernel does all or nothing. */
inline protect_again() {
	protect(1);
	if
	:: bad && !M_WAY_BACK_IGNORED ->
		W(W_BACK); bad = 0;
		if
		:: seen == WRITABLE -> set(MERGED, 0)
		:: else -> set(READONLY, 0)
		fi
	:: else -> bad = 0; set(seen, seen_frozen)
	fi
}

/* All of a run or nothing; M_THAW_HALF_WAY: this page was in the first half. */
inline open_or_not(then) {
	if
	:: true -> protect(1)
	:: failures > 0 && M_THAW_HALF_WAY -> atomic { failures = failures - 1; writable = 1; bad = 1 }
	fi;
	if
	:: bad -> bad = 0; set(seen, seen_frozen)
	:: else -> set(then, 0)
	fi
}

inline thaw() {
	atomic { guard != BUSY || !frozen -> seen = guard; seen_frozen = frozen };
	if
	:: !seen_frozen || seen == BUSY
	:: else ->
		claim_from(seen, seen_frozen, ok);
		if
		:: !ok
		:: ok && seen == MERGED && SIGSEGV -> set(MERGED, 0)
		:: ok && seen == MERGED && !SIGSEGV -> open_or_not(WRITABLE)
		:: else -> open_or_not(OPEN)
		fi;
		ok = 0
	fi
}

/* A run of pages. What fails half-way, perhaps with this one done, and cannot be undone, the thaw that follows undoes. */
inline freeze_private() {
	if
	:: M_FREEZE_OPEN
	:: else -> set(BUSY, 1)
	fi;
	protect(0);
	if
	:: bad ->
		if
		:: true -> bad = 0
		:: true -> bad = 0; writable = 0; protect(1)
		fi;
		if
		:: bad && !M_WAY_BACK_IGNORED -> W(W_BACK); bad = 0; set(READONLY, 1); thaw()
		:: else -> bad = 0; set(OPEN, 0)
		fi
	:: else -> set(READONLY, 1)
	fi
}

inline freeze_framed() {
	claim_settled();
	if
	:: seen == MERGED -> set(MERGED, 1)
	:: seen == READONLY -> set(READONLY, seen_frozen)
	:: else ->
		if
		:: seen == OPEN && word != KNOWN_PRIVATE -> forget()
		:: else
		fi;
		protect(0);
		if
		:: bad -> bad = 0; protect_again()
		:: !bad && seen == WRITABLE && word == KNOWN_MERGED && (!copied || M_FREEZE_BROKEN) && framed ->
			set(MERGED, 1)
		:: !bad && seen == WRITABLE && !(word == KNOWN_MERGED && (!copied || M_FREEZE_BROKEN) && framed) ->
			if
			:: true -> copy_over(0); forget(); set(READONLY, 1)
			:: failures > 0 -> failures = failures - 1; protect_again()
			fi
		:: else -> set(READONLY, 1)
		fi
	fi
}

inline freeze() {
	if
	:: word == KNOWN_PRIVATE && guard == OPEN -> freeze_private()
	:: else -> freeze_framed()
	fi
}

inline make_private() {
	atomic { guard != BUSY -> seen = guard; seen_frozen = frozen };
	if
	:: seen == OPEN || seen == WRITABLE ->
		atomic {
			if
			:: framed && !copied -> copied = 1; broken = broken + 1
			:: else
			fi
		}
	:: else ->
		claim_from(seen, seen_frozen, ok);
		if
		:: !ok
		:: ok && seen == MERGED -> copy_over(1); forget(); set(OPEN, 0)
		:: else -> open_or_not(OPEN)
		fi;
		ok = 0
	fi
}

/* `seen` is claimed. */
inline replace_claimed() {
	if
	:: seen == WRITABLE -> protect(0)
	:: else
	fi;
	if
	:: bad -> bad = 0; protect_again()
	:: else ->
		W(W_RESTORED);
		if
		:: M_PUT_FIRST -> forget()
		:: else
		fi;
		copy_over(!seen_frozen);
		forget();
		if
		:: seen_frozen -> set(READONLY, 1)
		:: else -> set(OPEN, 0)
		fi
	fi
}

/* Stores wait ("move") or nobody runs ("stop"). Without guards: what others hold is not asked. */
inline restore_held() {
	if
	:: BY_MOVE -> away = 1
	:: atomic { BY_STOP && handling == 0 -> parked = 1 }
	fi;
	atomic {
		if
		:: (copied || !framed) && word == KNOWN_MERGED -> word = KNOWN_BROKEN; counted = counted + 1
		:: else
		fi
	};
	if
	:: M_FORGET_EARLY -> forget()
	:: else
	fi;
	copy_over(1);
	W(W_RESTORED);
	forget();
	set(OPEN, 0);
	away = 0; parked = 0
}

inline restore() {
	if
	:: word == KNOWN_PRIVATE
	:: word != KNOWN_PRIVATE && guard == OPEN && !M_RESTORE_COUNTS -> forget()
	:: else ->
		atomic { guard != BUSY || M_RESTORE_BUSY -> seen = guard; seen_frozen = frozen };
		if
		:: seen == OPEN && !M_RESTORE_COUNTS -> forget()
		:: seen == MERGED || (seen == WRITABLE && BY_SEGV) ->
			if
			:: M_RESTORE_NO_CLAIM -> set(BUSY, frozen); ok = 1
			:: else -> claim_from(seen, seen_frozen, ok)
			fi;
			if
			:: ok -> ok = 0; replace_claimed()
			:: else
			fi
		:: !BY_SEGV && seen != MERGED && (seen != OPEN || M_RESTORE_COUNTS) -> restore_held()
		:: BY_SEGV && seen != MERGED && seen != WRITABLE && (seen != OPEN || M_RESTORE_COUNTS)
		fi
	fi
}

/* The program has freed it: what it stored is no loss. */
inline free() {
	do
	:: M_FREE_NO_CLAIM -> break
	:: atomic { !M_FREE_NO_CLAIM && (guard == OPEN || guard == WRITABLE) -> seen = guard }; break
	:: atomic { !M_FREE_NO_CLAIM && IS_READ_ONLY(guard) -> seen = guard; seen_frozen = frozen };
	   claim_from(seen, seen_frozen, ok);
	   if
	   :: ok -> ok = 0; break
	   :: else
	   fi
	od;
	atomic { framed = 0; copied = 0; writable = 1; content = 0; done = 0 };
	forget();
	set(OPEN, 0)
}

#define FREE_NOW  (config == OPENER && todo == 2)	/* the opener may be at work, or the next owner's store to come */

inline choose() {
	atomic {
		n = n - 1; lock = 1;
		if
		:: what = 1
		:: what = 2
		:: what = 3
		:: what = 4
		:: what = 5
		:: FREE_NOW -> what = 6
		fi
	}
}

inline work() {
	if
	:: what == 1 -> merge()
	:: what == 2 -> freeze()
	:: what == 3 -> thaw()
	:: what == 4 -> make_private()
	:: what == 5 -> restore()
	:: what == 6 -> free()
	fi
}

inline rest() {
	atomic { lock = 0; what = 0; ok = 0; bad = 0; seen = 0; seen_frozen = 0; fresh = 0; bytes = 0 }
}

proctype Holder(byte n; bool born) {
	bool ok, bad, taken, seen_frozen;
	byte seen, fresh, bytes, what;
	BEGIN
		do
		:: n > 0 ->
			choose();
			work();
			rest()
		:: else -> break
		od
	END
}

/* From here on we look at the child. Its other threads do not exist. */
proctype Fork() {
	if
	:: atomic { !lock || M_FORK_UNLOCKED -> forked = 1; lock = 0; away = 0; handling = 0 };
		/* those of the parent: */
		atomic { todo == 1 };
		if
		:: guard == BUSY && !M_ORPHAN_STAYS ->
			W(W_ORPHAN);
			writable = 1;
			atomic { guard = (M_ORPHAN_SAYS_OPEN -> OPEN : WRITABLE); frozen = 0 }
		:: else
		fi;
		if
		:: !M_FORK_KEEPS_BUSY && !M_ORPHAN_STAYS -> busy = 0
		:: else
		fi;
		atomic { todo = 2; run Thread(4, 1); run Holder(2, 1) }
	fi
}

init {
	atomic {
#ifdef WITNESS
		c_code {
			atexit(print_witnesses);
			config = atoi(getenv("CONFIG"));
			mutants = atoi(getenv("MUTANTS"));
		};
#endif
		run Monitor();
		todo = 3; run Thread(1, 0);
		if
		:: config == OPENER -> failures = 1; run Opener(); run Holder(3, 0)
		:: config == FORK -> run Fork(); run Holder(2, 0)
		:: config == FAILURES -> failures = 2; run Thread(2, 0); run Holder(2, 0)
		:: else -> run Thread(2, 0); run Holder(3, 0)
		fi
	};
	atomic {
		todo == 0 -> W(W_END);
		if
		:: busy != 0 || guard == BUSY -> BAD(4)
		:: breaks + counted < broken_here -> BAD(6)
		:: else
		fi
	}
}
