/* SPDX-License-Identifier: MIT */
/*
 * frames.pml: who may refer to a shared frame, and when it may be freed.
 *
 * DOC
 * One frame of the store, a few processes that map it, sweep it, free it and allocate it again, each of
 * which may be killed before any step or may stop for ever at any step. The frame has a cell, one word
 * changed by compare-and-swap: state, generation, owner (slot, slot epoch).
 *
 *     FREE --> ALLOC(owner) --> PUBLISHED <--> DYING(owner) --> FREE, generation + 1
 *                   |                              |                  ^
 *                   +--- the owner died -----------+                  |
 *                                   v                                 |
 *                              RAW(owner or nobody) ------------------+
 *
 * Each process has a slot, a slot epoch, a liveness lock that goes at the moment its mappings go, a bitmap
 * that only it writes, and a private count of its pages that are mapped onto the frame.
 *
 * take      under the merge lock: set own bit; fence; the cell must be PUBLISHED with the generation that
 *           the index named; compare the bytes; map; count. A miss clears the bit if the count is zero.
 * drop      under the merge lock: unmap; count down; at zero clear the bit.
 * allocate  under the merge lock: read a FREE cell, own count zero; set own bit; fence; no other live
 *           peer's bit is set; FREE -> ALLOC(me); write; ALLOC(me) -> PUBLISHED; map, or clear the bit.
 *           For the write alone the lock may be let go if the count is raised first (a pin).
 * sweep     read the peer epoch; enumerate live peers by their locks; read the cell; if no bit is set,
 *           PUBLISHED -> DYING(me), or a dead owner's ALLOC, DYING or RAW -> RAW(me); fence; read the bits
 *           again, then the peer epoch again. A bit or another epoch: DYING goes back to PUBLISHED, RAW to
 *           RAW(nobody), which the next sweep of anybody picks up. Else punch, then FREE, generation + 1.
 * join      take the lock; raise the slot epoch; raise the peer epoch; only then set bits.
 * fork      under the merge lock: take the child's lock on its behalf; raise the child's slot epoch; copy
 *           the bits; raise the peer epoch; fork; let go of the child's lock (the child holds it itself).
 *
 * REFS-1   No live process has a page mapped onto a frame whose bytes differ from those it compared.
 * REFS-2   A live process's count is above zero only while its bit is visibly set: the bit is set before
 *          the cell is read and cleared after the last unmapping. When it is quiet, bit and count agree.
 * REFS-3   While a cell is PUBLISHED its bytes are those published under its generation. (What was taken
 *          over from a dead owner may be half written or punched: it is never published again.)
 * REFS-4   An owned cell is changed by its owner, or after the owner's death by a compare-and-swap that
 *          makes it somebody else's. There are no timeouts.
 * REFS-5   Bytes of a frame are written by the owner of its ALLOC cell only, and punched by the owner of its
 *          DYING or RAW cell only, before it is FREE.
 * REFS-6   What frees a frame: all bits of all peers enumerated after the peer epoch was first read were
 *          clear after DYING or RAW was visible, and the peer epoch was the same after the last bit was read.
 * REFS-7   The peer epoch moves after the lock of a new peer is held and its slot epoch raised, and
 *          after the bits it is born with are in place (fork), and before its first own bit (join).
 * REFS-8   Who allocates has its own bit set from before it looks at the other bits until it has mapped
 *          the page or given up; so two that were handed one frame by a scribbled FREE never both write.
 * REFS-9   Nothing leaks: once all are quiet, one sweep by any live peer leaves a frame FREE unless some
 *          live process has it mapped.
 *
 * Asserted here: REFS-1 at every mapping and at every change of bytes, REFS-3 at every publication and
 * change of bytes, REFS-9 and the second half of REFS-2 at the end; with -DSTRICT (correct protocol only)
 * also the first half of REFS-2 at every mapping, and REFS-4 and REFS-5 where a frame is punched and freed;
 * with -DONLY_REFS_1 nothing but REFS-1. REFS-6, 7 and 8 are rules whose absence is a mutant.
 *
 * Memory order: total store order. The stores to a bitmap go through a first-in first-out buffer; a fence
 * and taking the merge lock empty it, releasing the lock does not; a killed process's buffer empties before
 * its lock goes. A compare-and-swap takes effect at once, except under -DWEAK_CAS, where loads that follow it
 * may be served before it unless a fence stands between (aarch64). The store of FREE and the unlock are not
 * buffered: the owner reads no shared word between them and its next atomic operation, so a late store is
 * the same as a slow process.
 *
 * Choose a configuration with -DCFG=<one of those below>; -DM_<name> breaks one rule; check.py knows all.
 */

#define TAKE_SWEEP      1	/* two takers, one with two pages and a thread that drops; a sweeper */
#define ALLOC_REUSE     2	/* stale takers against sweep, allocation, publication and a second sweep */
#define TWO_SWEEPERS    3	/* two sweepers and reuse: takeover of a dead one's cell */
#define JOIN            4	/* a process joins and takes during a sweep */
#define FORK            5	/* a process forks and drops during a sweep */
#define SLOT_REUSE      6	/* a dead allocator's or sweeper's slot is taken by a new process */
#define SCRIBBLE        7	/* a cell is overwritten with FREE while the frame is mapped, then allocated */
#define SCRIBBLE_ALLOC 10	/* the same while it is ALLOC, with a second allocator */
#define SCRIBBLE_JOIN   8	/* the same while a process joins */
#define SCRIBBLE_DYING  9	/* the same while it is DYING: needs -DSWEEP_CLAIM */

#define FREE       0
#define ALLOC      1
#define PUBLISHED  2
#define DYING      3	/* was PUBLISHED, bytes intact until the owner punches */
#define RAW        4	/* taken over from a dead owner: bytes not vouched for, can only be freed */

#define NOBODY   6	/* as an owner: never alive */
#define UNKNOWN  7	/* as an owner: what a cell without one would say (mutant) */

#define ZEROS  0	/* bytes of a punched frame */
#define HALF   9	/* bytes half written */

#define NP     4	/* processes; the last is the one that sweeps at the end */
#define LAST   3

#ifndef CFG
#define CFG TAKE_SWEEP
#endif

/*
 * Places that a correct configuration must reach, so that it does not pass by doing nothing. With -DWITNESS
 * (which the simulator cannot replay) the verifier prints their numbers.
 */
#ifdef WITNESS
c_decl {
	static unsigned witnesses;
	static void print_witnesses(void) { printf("witnesses %u\n", witnesses); }
}
#define W(n)  c_code { witnesses |= 1u << n; }
#else
#define W(n)  skip
#endif
#define W_TWICE     1	/* two pages of one process on the frame */
#define W_MISS      2	/* a take that found something else than it expected */
#define W_BACK      3	/* a sweep that went back because of a bit */
#define W_MOVED     4	/* a sweep that went back because the peer epoch moved */
#define W_FREED     5	/* a frame freed */
#define W_TAKEOVER  6	/* a dead owner's cell taken over */
#define W_RELEASED  7	/* a cell taken over and then let go to nobody */
#define W_REUSED    8	/* a frame published in its second generation and mapped */
#define W_REFUSED   9	/* an allocation that saw another's bit */
#define W_CHILD    10	/* the child has the only mapping */
#define W_JOINED   11	/* a mapping by a process that joined */
#define W_LOST     12	/* an allocation whose cell was changed under it */
#define W_END      13	/* the last sweep */

/* ---- shared memory ------------------------------------------------------------------------------ */

byte c_st, c_gen, c_own, c_oep;	/* the cell */
byte content;			/* bytes of the frame */
byte published;			/* ghost: the bytes last published */
byte peer_epoch;
byte lk[NP];			/* liveness lock of a slot: the set of processes that keep it */
byte sepoch[NP];		/* slot epoch */
bool bm[NP];			/* the bitmap of a process, as others see it */

/* ---- private to a process ----------------------------------------------------------------------- */

byte sbn[NP]; bool sb0[NP], sb1[NP];	/* store buffer of the bitmap */
byte alive[NP];				/* 0 not yet born, 1 alive, 2 dead */
bool ml[NP];				/* merge lock */
byte cnt[NP];				/* count of mapped pages (and pins) */
bool pg[8];				/* page k of process p, at 2p + k, is mapped onto the frame */
byte want[8];				/* what that page holds */
byte nact;				/* threads not yet finished */
bool fin;

/* Process 2 is a second incarnation of slot 0 in SLOT_REUSE; else a process's slot is its number. */
#if CFG == SLOT_REUSE
#define SLOT(p)   ((p) == 2 -> 0 : (p))
#define SEP(p)    ((p) == 2 -> 1 : 0)
#ifdef M_BITMAP_NO_SLOT_EPOCH
#define BITMAP(s) (s)			/* the bitmap that was mapped for this slot once */
#else
#define BITMAP(s) ((s) == 0 && sepoch[0] == 1 -> 2 : (s))
#endif
#else
#define SLOT(p)   (p)
#define SEP(p)    0
#define BITMAP(s) (s)
#endif

/* ---- assertions --------------------------------------------------------------------------------- */

#define GOOD(i)    (!pg[i] || content == want[i])
#define INTACT(p)  (alive[p] != 1 || (GOOD(2*(p)) && GOOD(2*(p)+1)))
#define REFS_1     assert(INTACT(0) && INTACT(1) && INTACT(2))
#ifdef ONLY_REFS_1
#define REFS_3     skip
#else
#define REFS_3     assert(c_st != PUBLISHED || content == published)
#endif

#ifdef STRICT
#define REFS_2(p)     assert(bm[p])
#define REFS_5(mine)  assert(mine)
#else
#define REFS_2(p)     skip
#define REFS_5(mine)  skip
#endif

/* ---- the bitmap and its store buffer ------------------------------------------------------------ */

inline flush(p) {
	if
	:: sbn[p] == 0
	:: sbn[p] == 1 -> bm[p] = sb0[p]
	:: sbn[p] == 2 -> bm[p] = sb1[p]
	fi;
	sbn[p] = 0; sb0[p] = 0; sb1[p] = 0
}

inline store_bit(p, v) {
	d_step {
		assert(sbn[p] < 2);
		if
		:: sbn[p] == 0 -> sb0[p] = v
		:: else -> sb1[p] = v
		fi;
		sbn[p] = sbn[p] + 1
	}
}

inline fence(p) { d_step { flush(p) } }
inline lock(p) { atomic { !ml[p] -> ml[p] = 1; flush(p) } }
inline unlock(p) { ml[p] = 0 }

inline clear_if_unused(p) {
	if
	:: cnt[p] == 0 -> store_bit(p, 0)
	:: else
	fi
}

inline map(p, k) {
	d_step { pg[2*p+k] = 1; cnt[p] = cnt[p] + 1; REFS_1; REFS_2(p) }
}

/* ---- take and drop ------------------------------------------------------------------------------ */

#ifdef M_NO_STATE
#define STATE_OK  true
#else
#define STATE_OK  (c_st == PUBLISHED)
#endif
#ifdef M_NO_GEN
#define GEN_OK(g)  true
#else
#define GEN_OK(g)  (c_gen == g)
#endif

/*
 * Steps that nobody else can see (private variables, a store that only enters the buffer, the merge lock
 * taken or released) are joined to a neighbour in one atomic step. A fence may be joined to the load after
 * it because Drain() may have emptied the buffer earlier.
 */
inline take(p, k, g) {
	atomic { lock(p); store_bit(p, 1) };
	atomic {
#ifndef M_TAKE_NO_FENCE
		fence(p);
#endif
		ok = STATE_OK && GEN_OK(g)
	};
#ifndef M_NO_COMPARE
	if
	:: ok -> ok = (content == want[2*p+k])
	:: else
	fi;
#endif
	atomic {
		if
		:: ok ->
			map(p, k);
			if
			:: cnt[p] == 2 -> W(W_TWICE)
			:: else
			fi
		:: else ->
			W(W_MISS);
#ifdef M_MISS_CLEARS
			store_bit(p, 0)
#else
			clear_if_unused(p)
#endif
		fi;
		ok = 0;
		unlock(p)
	}
}

inline drop(p, k) {
	if
	:: pg[2*p+k] ->
#if defined(M_DROP_NO_LOCK)
		atomic {
			pg[2*p+k] = 0; cnt[p] = cnt[p] - 1;
			if
			:: cnt[p] == 0 -> d_step { flush(p); bm[p] = 0 }
			:: else
			fi
		}
#elif defined(M_CLEAR_BEFORE_UNMAP)
		lock(p);
		if
		:: pg[2*p+k] -> cnt[p] = cnt[p] - 1; clear_if_unused(p); pg[2*p+k] = 0
		:: else
		fi;
		unlock(p)
#else
		atomic {
			lock(p);
			if
			:: pg[2*p+k] ->
				pg[2*p+k] = 0; cnt[p] = cnt[p] - 1;
#ifdef M_DROP_CLEARS
				store_bit(p, 0)
#else
				clear_if_unused(p)
#endif
			:: else
			fi;
			unlock(p)
		}
#endif
	:: else
	fi
}

/* ---- enumeration, the OR over bitmaps ----------------------------------------------------------- */

#if CFG == JOIN || CFG == FORK || CFG == SLOT_REUSE || CFG == SCRIBBLE_JOIN
#define PEERS_COME	/* live peers are not only those there were at the start */
#endif

#define LOCALS  byte e0, en, dir, s_st, s_gen, s_own, s_oep; bool ok, any, took, moved, held
#define FORGET  e0 = 0; en = 0; dir = 0; s_st = 0; s_gen = 0; s_own = 0; s_oep = 0; \
		ok = 0; any = 0; took = 0; moved = 0; held = 0

/*
 * en: the set of bitmaps of live peers. A bitmap belongs to (slot, slot epoch). Where no process joins or
 * forks the epoch and the locks are read in one step: locks can only go, and a peer that died after it
 * was enumerated only makes the sweep more careful.
 */
inline see(s) {
	if
	:: lk[s] != 0 -> en = en | (1 << BITMAP(s))
	:: else
	fi
}

inline enumerate() {
#if CFG == SLOT_REUSE
	held = (lk[0] != 0);		/* the lock, then the slot epoch */
	atomic {
		if
		:: held -> en = 1 << BITMAP(0)
		:: else
		fi;
		held = 0; see(1)
	}
#elif defined(PEERS_COME)
	atomic { en = 0; see(0) };
	atomic { see(1) };
	atomic { see(2) }
#else
	see(0); see(1); see(2)
#endif
}

/* Bitmaps are read one after the other; where bits move from one to another, in either order. */
#define BIT(mask, n)  (((mask) >> (n)) & bm[n])

inline or_bits(mask) {
#if CFG == FORK || CFG == JOIN || CFG == SLOT_REUSE
	atomic {
		if
		:: any = BIT(mask, 0)
		:: dir = 2; any = BIT(mask, 2)
		fi
	};
	any = any || BIT(mask, 1);
	atomic { any = any || (dir == 2 -> BIT(mask, 0) : BIT(mask, 2)); dir = 0 }
#elif CFG == TAKE_SWEEP
	any = BIT(mask, 0);
	any = any || BIT(mask, 1)
#else
	any = BIT(mask, 0);
	any = any || BIT(mask, 1);
	any = any || BIT(mask, 2)
#endif
}

/* ---- sweep -------------------------------------------------------------------------------------- */

#ifdef M_CELL_NO_SLOT_EPOCH
#define DEAD(s, e)  ((s) == NOBODY || ((s) != UNKNOWN && lk[s] == 0))
#else
#define DEAD(s, e)  ((s) == NOBODY || ((s) != UNKNOWN && (lk[s] == 0 || sepoch[s] != (e))))
#endif
#ifdef M_TIMEOUT
#define TAKEABLE(p, s, e)  ((s) != SLOT(p))
#else
#define TAKEABLE(p, s, e)  DEAD(s, e)
#endif

#define CELL_IS(st, g, own, oep)  (c_st == (st) && c_gen == (g) && c_own == (own) && c_oep == (oep))
#define SET_CELL(st, g, own, oep) c_st = st; c_gen = g; c_own = own; c_oep = oep

inline epoch_check() {
#if defined(PEERS_COME) && !defined(M_NO_EPOCH_CHECK)
	moved = (peer_epoch != e0)
#else
	skip
#endif
}

inline read_cell() { s_st = c_st; s_gen = c_gen; s_own = c_own; s_oep = c_oep }

/* What a dead owner left becomes RAW, PUBLISHED becomes DYING; the mutants trust what they took over. */
#if defined(M_UNDO_PUBLISH_DYING)
#define FROM_DEAD  (s_st == ALLOC || s_st == RAW)
#elif defined(M_UNDO_PUBLISH_ALLOC)
#define FROM_DEAD  (s_st == DYING || s_st == RAW)
#else
#define FROM_DEAD  (s_st == ALLOC || s_st == DYING || s_st == RAW)
#endif
#define MINE  CELL_IS((took -> RAW : DYING), s_gen, SLOT(p), SEP(p))

inline sweep(p) {
#ifdef M_ENUM_FIRST
	enumerate();
	e0 = peer_epoch;
#else
	e0 = peer_epoch;
#ifdef PEERS_COME
	enumerate();
#endif
#endif
#ifdef SWEEP_CLAIM
	/* hardening: own bit set from before DYING until FREE, so that REFS-8 covers punching too */
	atomic { lock(p); store_bit(p, 1) };
	fence(p);
#endif
	atomic {
#ifndef PEERS_COME
		enumerate();
#endif
#ifdef SWEEP_CLAIM
		en = en & ~(1 << p);
#endif
		read_cell();
		if
		:: s_st == PUBLISHED -> ok = 1
		:: s_st == FREE -> ok = 0
		:: else -> ok = TAKEABLE(p, s_own, s_oep)
		fi;
#ifdef SWEEP_CLAIM
		ok = ok && cnt[p] == 0;
#endif
		took = FROM_DEAD
	};
#ifndef M_NO_PREFILTER
	if
	:: ok -> or_bits(en); atomic { ok = !any; any = 0 }
	:: else
	fi;
#endif
#if defined(WEAK_CAS) && defined(M_SWEEP_NO_FENCE)
	if	/* the loads overtake the compare-and-swap */
	:: ok -> or_bits(en)
	:: else
	fi;
#endif
	if
	:: ok ->
		atomic {
			if
			:: CELL_IS(s_st, s_gen, s_own, s_oep) ->
				SET_CELL((took -> RAW : DYING), s_gen, SLOT(p), SEP(p));
				if
				:: took -> W(W_TAKEOVER)
				:: else
				fi
			:: else -> ok = 0
			fi;
			s_st = 0; s_own = 0; s_oep = 0
		}
		/* here the fence: the compare-and-swap is one, unless WEAK_CAS and M_SWEEP_NO_FENCE, see there */
	:: else
	fi;
	if
	:: ok ->
#ifdef M_EPOCH_BEFORE_OR
		epoch_check();
#endif
#if !defined(M_NO_RECHECK) && !(defined(WEAK_CAS) && defined(M_SWEEP_NO_FENCE))
		or_bits(en);
#endif
#ifndef M_EPOCH_BEFORE_OR
		epoch_check();
#endif
		if
		:: any || moved ->
			atomic {
				if
				:: any -> W(W_BACK)
				:: else -> W(W_MOVED)
				fi;
				if
				:: MINE ->
					if
					:: took ->
						W(W_RELEASED);
#ifndef M_UNDO_KEEPS
						SET_CELL(RAW, s_gen, NOBODY, 0)
#endif
					:: else ->
						SET_CELL(PUBLISHED, s_gen, NOBODY, 0);
						REFS_3
					fi
				:: else
				fi
			}
		:: else ->
#ifdef M_PUNCH_AFTER_FREE
			atomic { SET_CELL(FREE, s_gen + 1, NOBODY, 0) };
			atomic { content = ZEROS; REFS_1; REFS_3 }
#else
			atomic { REFS_5(MINE); content = ZEROS; REFS_1; REFS_3 };
			atomic { REFS_5(MINE); SET_CELL(FREE, s_gen + 1, NOBODY, 0); W(W_FREED) }
#endif
		fi
	:: else
	fi;
	atomic {
#ifdef SWEEP_CLAIM
		clear_if_unused(p);
		unlock(p);
#endif
		FORGET
	}
}

/* ---- allocate ----------------------------------------------------------------------------------- */

#ifdef M_NO_OWNER
#define OWNER(p)  UNKNOWN
#else
#define OWNER(p)  SLOT(p)
#endif

inline allocate(p, k, bytes) {
#ifdef PEERS_COME
	e0 = peer_epoch;
	enumerate();
#endif
	atomic {
		lock(p);
#ifndef PEERS_COME
		enumerate();
#endif
		read_cell();
		en = en & ~(1 << p);
		ok = (s_st == FREE && cnt[p] == 0);
#ifndef M_ALLOC_BIT_LATE
		if
		:: ok -> store_bit(p, 1)
		:: else
		fi
#endif
	};
	if
	:: ok ->
#if !defined(M_ALLOC_NO_FENCE) && !defined(M_ALLOC_BIT_LATE)
		fence(p);
#endif
#ifndef M_ALLOC_NO_OR
		or_bits(en);
#if defined(PEERS_COME) && !defined(M_ALLOC_NO_EPOCH)
		moved = (peer_epoch != e0);
#endif
#endif
		atomic {
			if
			:: any || moved -> W(W_REFUSED); ok = 0
			:: else ->
				if
				:: CELL_IS(FREE, s_gen, s_own, s_oep) -> SET_CELL(ALLOC, s_gen, OWNER(p), SEP(p))
				:: else -> ok = 0
				fi
			fi;
			s_st = 0; s_own = 0; s_oep = 0; any = 0; moved = 0
		}
	:: else
	fi;
	if
	:: ok ->
#ifdef M_ALLOC_BIT_LATE
		store_bit(p, 1);
#endif
#ifdef ALLOC_UNLOCKED
#ifndef M_NO_PIN
		atomic { cnt[p] = cnt[p] + 1; unlock(p) };
#else
		unlock(p);
#endif
#endif
		atomic { content = HALF; REFS_1; REFS_3 };
		atomic { content = bytes; REFS_1; REFS_3 };
#ifdef ALLOC_UNLOCKED
#ifndef M_NO_PIN
		atomic { lock(p); cnt[p] = cnt[p] - 1 };
#else
		lock(p);
#endif
#endif
		atomic {
#ifdef M_BLIND_PUBLISH
			published = bytes; SET_CELL(PUBLISHED, s_gen, NOBODY, 0); REFS_3
#else
			if
			:: CELL_IS(ALLOC, s_gen, OWNER(p), SEP(p)) ->
				published = bytes; SET_CELL(PUBLISHED, s_gen, NOBODY, 0); REFS_3
			:: else -> W(W_LOST); ok = 0
			fi
#endif
		};
		if	/* the page it was for: still the same and mapped, or written to meanwhile */
		:: ok -> map(p, k); W(W_REUSED)
		:: true
		fi
	:: else
	fi;
	atomic { clear_if_unused(p); unlock(p); FORGET }
}

/* ---- join and fork ------------------------------------------------------------------------------ */

/* ok: joined. The lock is not waited for. */
inline join(p) {
#ifdef M_BUMP_BEFORE_LOCK
	peer_epoch = peer_epoch + 1;
#endif
	atomic {
		if
		:: lk[SLOT(p)] == 0 -> lk[SLOT(p)] = 1 << p; ok = 1
		:: else -> ok = 0
		fi
	};
	if
	:: ok ->
#ifndef M_SLOT_EPOCH_LATE
		sepoch[SLOT(p)] = SEP(p);
#endif
#if !defined(M_NO_BUMP_JOIN) && !defined(M_BUMP_LATE) && !defined(M_BUMP_BEFORE_LOCK)
		peer_epoch = peer_epoch + 1;
#endif
#ifdef M_SLOT_EPOCH_LATE
		sepoch[SLOT(p)] = SEP(p);
#endif
#ifdef M_BUMP_LATE
		/* the first take has set its bit and found the frame PUBLISHED; the epoch moves after it */
		take(p, 0, 0);
		peer_epoch = peer_epoch + 1;
#endif
		ok = 1
	:: else
	fi
}

inline fork(p, c) {
#ifndef M_FORK_NO_LOCK
	lock(p);
#else
	fence(p);
#endif
#ifndef M_FORK_LOCK_LATE
	lk[c] = 1 << p;
#endif
#ifdef BUMP_FIRST
#ifndef M_NO_BUMP_FORK
	peer_epoch = peer_epoch + 1;
#endif
	bm[c] = bm[p];
#else
	bm[c] = bm[p];
#ifndef M_NO_BUMP_FORK
	peer_epoch = peer_epoch + 1;
#endif
#endif
	atomic {	/* fork(2) */
		alive[c] = 1; pg[2*c] = pg[2*p]; pg[2*c+1] = pg[2*p+1]; cnt[c] = cnt[p];
#ifndef M_FORK_LOCK_LATE
		lk[c] = lk[c] | (1 << c)
#endif
	};
#ifndef M_FORK_LOCK_LATE
	lk[c] = lk[c] & ~(1 << p);
#endif
#ifndef M_FORK_NO_LOCK
	unlock(p)
#endif
}

/* ---- death -------------------------------------------------------------------------------------- */

inline die(p) {
	d_step {
		flush(p);
		alive[p] = 2; ml[p] = 0; cnt[p] = 0; pg[2*p] = 0; pg[2*p+1] = 0;
		lk[0] = lk[0] & ~(1 << p); lk[1] = lk[1] & ~(1 << p); lk[2] = lk[2] & ~(1 << p)
	}
}

#ifndef MORTALS
#define MORTALS 7
#endif
#define MORTAL(p)  ((MORTALS >> (p)) & 1)

proctype Kill() {
end:
	do
	:: atomic { MORTAL(0) && !fin && alive[0] == 1 -> die(0) }
	:: atomic { MORTAL(1) && !fin && alive[1] == 1 -> die(1) }
	:: atomic { MORTAL(2) && !fin && alive[2] == 1 -> die(2) }
	:: fin -> break
	od
}

/* The store buffers empty whenever they like. */
proctype Drain() {
end:
	do
	:: d_step { sbn[0] > 0 -> bm[0] = sb0[0]; sb0[0] = sb1[0]; sb1[0] = 0; sbn[0] = sbn[0] - 1 }
	:: d_step { sbn[1] > 0 -> bm[1] = sb0[1]; sb0[1] = sb1[1]; sb1[1] = 0; sbn[1] = sbn[1] - 1 }
	:: d_step { sbn[2] > 0 -> bm[2] = sb0[2]; sb0[2] = sb1[2]; sb1[2] = 0; sbn[2] = sbn[2] - 1 }
	:: fin -> break
	od
}

/* ---- threads ------------------------------------------------------------------------------------ */

#define BEGIN(p)  {
#define END(p, forget)  ; atomic { forget; nact = nact - 1 } } \
	unless { atomic { alive[p] == 2 -> forget; nact = nact - 1 } }

/* Takes onto n pages of its own. */
proctype Taker(byte p, g, n) {
	bool ok; byte j;
	BEGIN(p)
		do
		:: j < n -> take(p, j, g); j = j + 1
		:: else -> break
		od
	END(p, ok = 0; j = 0)
}

/* Another thread of the same process. n drops, of any page. */
proctype Dropper(byte p, n) {
	byte j, k;
	BEGIN(p)
		do
		:: j < n ->
			atomic {
				j = j + 1;
				if
				:: k = 0
				:: k = 1
				fi
			};
			drop(p, k)
		:: else -> break
		od
	END(p, j = 0; k = 0)
}

/* n sweeps, then allocates for page 1 if there is something to write. */
proctype Scan(byte p, n, bytes) {
	LOCALS;
	BEGIN(p)
		do
		:: n > 0 -> sweep(p); n = n - 1
		:: else -> break
		od;
		if
		:: bytes != 0 -> allocate(p, 1, bytes)
		:: else
		fi
	END(p, FORGET; n = 0)
}

#if CFG == JOIN || CFG == SCRIBBLE_JOIN || CFG == SLOT_REUSE
proctype Joiner(byte p, g) {
	bool ok;
	BEGIN(p)
		join(p);
		if
		:: ok ->
#ifndef M_BUMP_LATE
			take(p, 0, g);
#endif
			if
			:: pg[2*p] -> W(W_JOINED)
			:: else
			fi
		:: else
		fi
	END(p, ok = 0)
}
#endif

#if CFG == FORK
/* Has the frame mapped or takes it, forks, drops its own page. */
proctype Forker(byte p, c) {
	bool ok;
	BEGIN(p)
#ifndef M_FORK_NO_LOCK
		take(p, 0, 0);
#endif
		fork(p, c);
		drop(p, 0)
	END(p, ok = 0)
}

proctype Child(byte p, c) {
	BEGIN(c)
		if
		:: alive[c] == 1 ->
#ifdef M_FORK_LOCK_LATE
			lk[c] = 1 << c;
#endif
			if
			:: pg[2*c] && !pg[2*p] -> W(W_CHILD)
			:: drop(c, 0)
			fi
		:: alive[c] == 0 && alive[p] == 2	/* never born */
		fi
	END(c, skip)
}

#endif

/* A confused peer writes FREE over a cell. */
proctype Scribble() {
	atomic {
		if
#if CFG == SCRIBBLE_DYING
		:: c_st != FREE -> SET_CELL(FREE, c_gen, NOBODY, 0)
#else
		:: c_st == PUBLISHED || c_st == ALLOC -> SET_CELL(FREE, c_gen, NOBODY, 0)
#endif
		:: nact == 1
		fi
	};
	nact = nact - 1
}

#define AGREE(p) (alive[p] != 1 || lk[SLOT(p)] != (1 << p) || bm[p] == (cnt[p] > 0))

/* All are quiet or dead: one sweep by a live peer must leave nothing behind. */
proctype Last() {
	atomic {
		nact == 0 -> fin = 1; flush(0); flush(1); flush(2);
		lk[LAST] = 1 << LAST;
		nact = 1; run Scan(LAST, 1, 0)
	};
	atomic {
		nact == 0 -> W(W_END); REFS_1
#ifndef ONLY_REFS_1
		;
		assert(c_st == FREE || cnt[0] > 0 || cnt[1] > 0 || cnt[2] > 0);		/* REFS-9 */
		assert(AGREE(0) && AGREE(1) && AGREE(2))				/* REFS-2 */
#endif
	}
}

#define LIVE(p)        alive[p] = 1; lk[SLOT(p)] = 1 << p
#define START(thread)  nact = nact + 1; run thread

init {
	atomic {
#ifdef WITNESS
		c_code { atexit(print_witnesses); };
#endif
		byte n;
		SET_CELL(PUBLISHED, 0, NOBODY, 0); content = 1; published = 1;
		do
		:: n < 8 -> want[n] = 1; n = n + 1
		:: else -> n = 0; break
		od;
		alive[LAST] = 1;
#if CFG == TAKE_SWEEP
		LIVE(0); LIVE(1);
		START(Taker(0, 0, 2)); START(Dropper(0, 2));
		START(Taker(1, 0, 1)); START(Scan(1, 1, 0));
#elif CFG == ALLOC_REUSE
		LIVE(0); LIVE(1); LIVE(2);
		SET_CELL(FREE, 1, NOBODY, 0); content = ZEROS; published = ZEROS;
		want[0] = 2; want[3] = 2;
		want[2] = 7;	/* page 0 of process 1 has the digest of the content, not its bytes */
		START(Taker(0, 1, 1));
		START(Scan(1, 0, 2)); START(Taker(1, 1, 1));
		START(Scan(2, 1, 0));
#elif CFG == TWO_SWEEPERS
		LIVE(0); LIVE(1); LIVE(2);
		want[3] = 2;
		START(Scan(0, 1, 0));
		START(Scan(1, 1, 2));
		START(Taker(2, 0, 1));
#elif CFG == JOIN
		LIVE(0); alive[1] = 1;
		START(Scan(0, 2, 0));
		START(Joiner(1, 0));
#elif CFG == FORK
		LIVE(0); LIVE(2);
		START(Forker(0, 1)); START(Child(0, 1));
#ifdef M_FORK_NO_LOCK
		START(Taker(0, 0, 1));		/* another thread takes meanwhile */
#else
		START(Dropper(0, 1));
#endif
		START(Scan(2, 1, 0));
#elif CFG == SLOT_REUSE
		LIVE(0); LIVE(1); alive[2] = 1;
		want[1] = 2; want[4] = 2;
		START(Scan(0, 1, 2));
		START(Joiner(2, 1));
		START(Scan(1, 2, 0));
#elif CFG == SCRIBBLE
		LIVE(0); LIVE(1);
		want[3] = 2;
		START(Taker(0, 0, 1)); START(Dropper(0, 1));
		START(Scan(1, 0, 2));
		START(Scribble());
#elif CFG == SCRIBBLE_ALLOC
		LIVE(1); LIVE(2);
		SET_CELL(FREE, 1, NOBODY, 0); content = ZEROS; published = ZEROS;
		want[3] = 2; want[5] = 3;
		START(Scan(1, 0, 2)); START(Scan(2, 0, 3));
		START(Scribble());
#elif CFG == SCRIBBLE_JOIN
		LIVE(1); alive[0] = 1;
		want[3] = 2;
		START(Joiner(0, 0));
		START(Scan(1, 0, 2));
		START(Scribble());
#elif CFG == SCRIBBLE_DYING
		LIVE(0); LIVE(1); LIVE(2);
		want[3] = 2;
		START(Scan(0, 1, 0));
		START(Scan(1, 0, 2));
		START(Taker(2, 0, 1));
		START(Scribble());
#endif
		run Kill(); run Drain(); run Last()
	}
}
