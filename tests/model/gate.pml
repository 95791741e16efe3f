/* SPDX-License-Identifier: MIT */
/*
 * gate.pml: how every thread of a process is held in a signal handler, and let go.
 *
 * DOC
 * One scanner, and up to three threads of the program, some of which are created and end while they are being
 * gathered. The scanner makes a few stops in a row. It may give up any but the last at every moment while it
 * waits, and begins the next at once. The protocol is that of csrc/gate.c and csrc/park.c:
 *
 * close     missing = (stop, 0); gate = stop.
 * gather    list the threads; to each that has no slot in this stop: slot = (stop, thread, SENT), one more
 *           missing, send (stop, slot). Whoever has ended by then is GONE. If anybody was new: wait until none
 *           is missing, and list again. While signals are sent one more is missing.
 * look      of the missing, those that have ended are GONE, those that need not park (a main thread that has
 *           ended, a scanner of another domain) LEFT; none of them is missing any more.
 * open      gate = 0; wake all.
 * signal    slot from (stop, any, SENT) to PARKED, or else return. If `missing` is this stop's: one less. While
 *           the gate is this stop's: sleep, unless it moves first.
 *
 * The kernel lists threads in the order in which they were created, one after the other, without those that have
 * ended; a main thread stays as a zombie. A signal is delivered whenever the thread likes, perhaps long after
 * the stop that it was for.
 *
 * PARK      Between a successful begin and its end no thread runs code of the program: none is outside of the
 *           handler, leaves it, is created, or ends.
 * COUNT     `missing` is never lowered below zero, and it is zero when all are held.
 * SLEEP     Nobody waits for ever: every thread ends, and the last stop, which is not given up, succeeds.
 * ENDS      No path is endless.
 *
 * Sequential consistency: each store of the protocol is followed by a full barrier or a system call before
 * anything depends on it. CONFIG is one of those below, the bits of MUTANTS break one rule each; check.py knows
 * all.
 */

#define LATE    1	/* two threads, three stops: signals and threads of earlier stops */
#define LIFE    2	/* a main thread; threads are created and end */
#define REUSE   3	/* a thread takes the number of one that has ended */
#define EXEMPT  4	/* a scanner of another domain begins and ends */

/* The verifier asks its environment for both, so that one build serves all. */
#ifndef CONFIG
#define CONFIG LATE
#endif
#ifndef MUTANTS
#define MUTANTS 0
#endif
hidden int config = CONFIG;
hidden int mutants = MUTANTS;
#define MUTANT(n)  ((mutants >> (n)) & 1)

#define N      3	/* threads; two in LATE and EXEMPT */
#define SLOTS  N
#define STOPS  (config == LATE -> 3 : 2)

#ifdef WITNESS
c_decl {
	static unsigned witnesses;
	static void print_witnesses(void) { printf("witnesses %u\n", witnesses); }
}
#define W(n)  c_code { witnesses |= 1u << n; }
#else
#define W(n)  skip
#endif
#define W_HELD    1	/* a stop that succeeded */
#define W_GIVEN   2	/* a stop that was given up */
#define W_LATE    3	/* a signal of an earlier stop */
#define W_BEHIND  4	/* a thread that parked in an earlier stop and counts itself in a later one */
#define W_ESRCH   5	/* a thread that had ended when it was sent to */
#define W_GONE    6	/* … and one that ended afterwards */
#define W_LEFT    7	/* one that need not park */
#define W_THREE   8	/* three threads held */
#define W_AGAIN   9	/* a number sent to twice in one stop */
#define W_SLOT   10	/* a late signal that names another thread's slot */
#define W_MOVED  11	/* a thread that does not fall asleep, because the gate has moved */
#define W_END    12	/* all ended */

/* Rules to be broken. */
#define M_ONE_LISTING            MUTANT(1)
#define M_LIST_AGAIN_AT_ONCE     MUTANT(2)
#define M_LIST_BY_NUMBER         MUTANT(3)
#define M_ESRCH_IS_NOBODY        MUTANT(4)
#define M_SLOT_NO_STOP           MUTANT(5)
#define M_VALUE_NO_STOP          MUTANT(6)
#define M_MISSING_NO_STOP        MUTANT(7)
#define M_ARRIVE_TWO_STEPS       MUTANT(8)
#define M_ARRIVE_AFTER_WAITING   MUTANT(9)
#define M_CLOSE_LATE             MUTANT(10)
#define M_WAIT_ANY_GATE          MUTANT(11)
#define M_SLEEP_BLINDLY          MUTANT(12)
#define M_NO_WAKE                MUTANT(13)
#define M_WAKE_ONE               MUTANT(14)
#define M_WAKE_FIRST             MUTANT(15)
#define M_COUNT_LATE             MUTANT(16)
#define M_SENDING_UNCOUNTED      MUTANT(17)
#define M_SEND_TWICE             MUTANT(18)
#define M_GONE_STAYS             MUTANT(19)
#define M_GONE_IS_AWAITED        MUTANT(20)
#define M_ZOMBIE_IS_AWAITED      MUTANT(21)
#define M_EXEMPT_IS_AWAITED      MUTANT(22)
#define M_UNEXEMPT_NO_LOCK       MUTANT(23)
#define M_WITHDRAW_BLINDLY       MUTANT(24)
#define M_NO_EXCHANGE            MUTANT(25)
#define M_ALWAYS_NEW             MUTANT(26)

/* ---- threads, as the kernel has them --------------------------------------------------------------- */

#define UNBORN  0
#define ALIVE   1
#define DEAD    2
#define ZOMBIE  3

byte life[N];
byte task[N], tasks;		/* in the order of their creation */
byte signals[N*4];		/* at 4t + stop: the slot that the pending signal names, + 1 */
bool asleep[N];

#define NUMBER(t)   (config == REUSE && (t) == 2 -> 0 : (t))
#define THREAD(n)   (config == REUSE && (n) == 0 && life[2] != UNBORN -> 2 : (n))
#define EXISTS(n)   (life[THREAD(n)] == ALIVE || life[THREAD(n)] == ZOMBIE)

/* ---- shared ------------------------------------------------------------------------------------------- */

#define SENT    0
#define PARKED  1
#define GONE    2
#define LEFT    3

byte slot_stop[SLOTS], slot_thread[SLOTS], slot_state[SLOTS];
byte gate;
byte missing_stop, missing;	/* one word */
bool turn;
bool exempt[N];
bool dead_leader;
byte stop;			/* the last one */

/* ---- ghosts ------------------------------------------------------------------------------------------- */

bool held;			/* between begin and end */
byte within[N];			/* the stop in which a thread has exchanged its slot; 0: it runs */
bool own[N];			/* runs our code alone */
bool over;

#define STILL(t)    (life[t] == UNBORN || life[t] == DEAD || life[t] == ZOMBIE || own[t] || within[t] == stop)
#define ALL_STILL   (STILL(0) && STILL(1) && STILL(2))

/* ---- in the threads ----------------------------------------------------------------------------------- */

inline lower() { assert(missing > 0); missing = missing - 1 }

inline arrive(s) {
	if
	:: atomic { M_MISSING_NO_STOP -> lower() }
	:: M_ARRIVE_TWO_STEPS && missing_stop == s -> lower()
	:: atomic {
		!M_MISSING_NO_STOP && !(M_ARRIVE_TWO_STEPS && missing_stop == s) ->
		if
		:: missing_stop == s -> lower()
		:: else -> W(W_BEHIND)
		fi
	   }
	fi
}

#define CLOSED(s)   (gate == s || (M_WAIT_ANY_GATE && gate != 0))

/* The kernel compares, and puts to sleep, in one step. */
inline sleep(t, s) {
	if
	:: M_SLEEP_BLINDLY -> asleep[t] = 1
	:: atomic {
		!M_SLEEP_BLINDLY ->
		if
		:: CLOSED(s) -> asleep[t] = 1
		:: else -> W(W_MOVED)
		fi
	   }
	fi;
	!asleep[t]
}

#define MINE(s, i)  (slot_stop[i] == s || M_SLOT_NO_STOP)

inline handle(t, s, i) {
	atomic {
		if
		:: s < stop -> W(W_LATE)
		:: else
		fi;
		if
		:: s < stop && slot_stop[i] == stop && slot_thread[i] != NUMBER(t) -> W(W_SLOT)
		:: else
		fi;
		if
		:: M_VALUE_NO_STOP -> s = slot_stop[i]
		:: else
		fi;
		if
		:: MINE(s, i) && slot_state[i] == SENT -> slot_state[i] = PARKED; within[t] = s
		:: M_NO_EXCHANGE -> within[t] = s
		:: else -> s = 0
		fi
	};
	if
	:: s == 0
	:: else ->
		if
		:: !M_ARRIVE_AFTER_WAITING -> arrive(s)
		:: else
		fi;
		do
		:: CLOSED(s) -> sleep(t, s)
		:: else -> break
		od;
		if
		:: M_ARRIVE_AFTER_WAITING -> arrive(s)
		:: else
		fi
	fi;
	atomic { assert(!held || within[t] == 0); within[t] = 0; s = 0; i = 0 }
}

/* The oldest of the pending signals. */
inline deliver(t, s, i) {
	atomic {
		if
		:: signals[4*t+1] -> s = 1
		:: !signals[4*t+1] && signals[4*t+2] -> s = 2
		:: !signals[4*t+1] && !signals[4*t+2] && signals[4*t+3] -> s = 3
		fi;
		i = signals[4*t+s] - 1; signals[4*t+s] = 0
	}
}

inline forget_signals(t) { signals[4*t+1] = 0; signals[4*t+2] = 0; signals[4*t+3] = 0 }

#define COME_AND_GO  (config == LIFE || config == REUSE)
#define CAN_CREATE   (COME_AND_GO && tasks < N && (config == LIFE || tasks < 2 || life[0] == DEAD))

proctype Thread(byte t) {
	byte s, i;
	do
	:: deliver(t, s, i); handle(t, s, i)
	:: atomic {
		CAN_CREATE ->
		assert(!held);
		life[tasks] = ALIVE; task[tasks] = tasks; tasks = tasks + 1;
		run Thread(tasks - 1)
	   }
	:: atomic {
		COME_AND_GO ->
		assert(!held);
		life[t] = (config == LIFE && t == 0 -> ZOMBIE : DEAD);
		forget_signals(t)
	   };
	   break
	:: atomic { over -> life[t] = DEAD; forget_signals(t) }; break
	od
}

/* A scanner of another domain: signals are blocked in it; then it becomes a thread like others. */
proctype Other(byte t) {
	exempt[t] = 1;
	atomic { !turn || M_UNEXEMPT_NO_LOCK -> exempt[t] = 0; own[t] = 0; assert(!held) };
	run Thread(t)
}

/* ---- the scanner ---------------------------------------------------------------------------------------- */

/* i: the slot of number n in this stop, or a free one. Every number's first choice is slot 0. */
inline find_slot(n, i) {
	i = 0;
	do
	:: slot_stop[i] != stop || slot_thread[i] == n -> break
	:: else -> i = i + 1
	od
}

inline withdraw(i, as) {
	if
	:: slot_state[i] == SENT -> slot_state[i] = as; lower()
	:: else
	fi
}

#define HAS_SIGNAL(i)  (slot_stop[i] == stop && (slot_state[i] != GONE || M_GONE_STAYS) && !M_SEND_TWICE)

inline count_one() { missing = missing + 1 }

inline send(n) {
	atomic {
		find_slot(n, i);
		if
		:: HAS_SIGNAL(i) -> i = SLOTS; fresh = fresh || M_ALWAYS_NEW
		:: else ->
			if
			:: slot_stop[i] == stop -> W(W_AGAIN)
			:: else
			fi;
			slot_stop[i] = stop; slot_thread[i] = n; slot_state[i] = SENT
		fi
	};
	if
	:: i == SLOTS
	:: else ->
		if
		:: atomic { !M_COUNT_LATE -> count_one() }
		:: atomic { M_COUNT_LATE }
		fi;
		atomic {
			if
			:: life[THREAD(n)] == ALIVE -> signals[4*THREAD(n)+stop] = i + 1; fresh = 1
			:: life[THREAD(n)] == ZOMBIE -> fresh = 1
			:: else ->
				W(W_ESRCH);
				fresh = fresh || !M_ESRCH_IS_NOBODY;
				if
				:: M_COUNT_LATE -> slot_state[i] = GONE
				:: else -> withdraw(i, GONE)
				fi;
				i = SLOTS
			fi
		};
		if
		:: atomic { M_COUNT_LATE && i != SLOTS -> count_one() }
		:: atomic { !(M_COUNT_LATE && i != SLOTS) -> skip }
		fi
	fi;
	i = 0
}

/* By number: where who is created has a lower one than who creates. */
#define LISTED_AT(pos)  (M_LIST_BY_NUMBER -> N - 1 - (pos) : task[pos])
#define LIST_END        (M_LIST_BY_NUMBER -> N : tasks)

inline list() {
	known = 0; n = 0;
	do
	:: atomic {
		n < LIST_END -> i = LISTED_AT(n);
		if
		:: life[i] == UNBORN || life[i] == DEAD || exempt[i] || (life[i] == ZOMBIE && dead_leader)
		:: else -> known = known | (1 << NUMBER(i))
		fi;
		i = 0; n = n + 1
	   }
	:: else -> break
	od;
	n = 0
}

/* Is n missing, and no use to be waited for? */
#define ENDED(n)  (!EXISTS(n) && !M_GONE_IS_AWAITED)
#define IDLE(n)   ((exempt[THREAD(n)] && !M_EXEMPT_IS_AWAITED) || \
		   (life[THREAD(n)] == ZOMBIE && !M_ZOMBIE_IS_AWAITED))
#define LACKS(n, i)  (((known >> (n)) & 1) && slot_stop[i] == stop && slot_thread[i] == (n) && slot_state[i] == SENT)

inline look_at(n, i) {
	if
	:: atomic {
		!M_WITHDRAW_BLINDLY && LACKS(n, i) && ENDED(n) -> W(W_GONE); withdraw(i, GONE)
	   }
	:: atomic {
		!M_WITHDRAW_BLINDLY && LACKS(n, i) && IDLE(n) ->
		W(W_LEFT); withdraw(i, LEFT); dead_leader = dead_leader || life[THREAD(n)] == ZOMBIE
	   }
	:: M_WITHDRAW_BLINDLY && LACKS(n, i) && ENDED(n) -> atomic { slot_state[i] = GONE; lower() }
	:: M_WITHDRAW_BLINDLY && LACKS(n, i) && IDLE(n) -> atomic { slot_state[i] = LEFT; lower() }
	fi
}

/* Always where a number that was sent to may be taken by another thread, and is waited for in vain. */
#define MAY_GIVE_UP  (stop < STOPS || config == REUSE)

inline await() {
	do
	:: missing == 0 -> break
	:: look_at(0, 0)
	:: look_at(0, 1)
	:: look_at(1, 0)
	:: look_at(1, 1)
	:: look_at(0, 2)
	:: look_at(1, 2)
	:: look_at(2, 0)
	:: look_at(2, 1)
	:: look_at(2, 2)
	:: MAY_GIVE_UP -> W(W_GIVEN); given = 1; break
	od
}

inline close() {
	stop = stop + 1; missing_stop = stop; missing = 0
}

#define WAKE_ALL    asleep[0] = 0; asleep[1] = 0; asleep[2] = 0
#define THREE       (within[0] && within[1] && within[2])

inline open() {
	if
	:: M_WAKE_FIRST -> d_step { WAKE_ALL }
	:: else
	fi;
	gate = 0;
	d_step {
		if
		:: M_WAKE_FIRST || M_NO_WAKE
		:: M_WAKE_ONE && asleep[0] -> asleep[0] = 0
		:: else -> WAKE_ALL
		fi
	}
}

proctype Scanner() {
	byte n, i, known;
	bool fresh, given;
	do
	:: stop == STOPS -> break
	:: else ->
		turn = 1;
		atomic { close() };
		if
		:: !M_CLOSE_LATE -> gate = stop
		:: else
		fi;
		do
		:: true ->
			atomic {
				if
				:: M_SENDING_UNCOUNTED
				:: else -> count_one()
				fi
			};
			list();
			do
			:: n < N ->
				if
				:: (known >> n) & 1 -> send(n)
				:: else
				fi;
				n = n + 1
			:: else -> n = 0; break
			od;
			atomic {
				if
				:: M_SENDING_UNCOUNTED
				:: else -> lower()
				fi;
				if
				:: M_CLOSE_LATE -> gate = stop
				:: else
				fi
			};
			if
			:: !fresh && M_LIST_AGAIN_AT_ONCE -> await(); break
			:: fresh && M_LIST_AGAIN_AT_ONCE
			:: !fresh && !M_LIST_AGAIN_AT_ONCE -> break
			:: fresh && !M_LIST_AGAIN_AT_ONCE ->
				await();
				if
				:: given || M_ONE_LISTING -> break
				:: else
				fi
			fi;
			fresh = 0
		od;
		fresh = 0;
		if
		:: given
		:: else ->
			atomic {
				W(W_HELD); assert(missing == 0); held = 1; assert(ALL_STILL);
				if
				:: THREE -> W(W_THREE)
				:: else
				fi
			};
			held = 0
		fi;
		given = 0;
		open();
		turn = 0
	od;
	over = 1
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
		life[0] = ALIVE; task[0] = 0; tasks = 1;
		run Scanner(); run Thread(0);
		if
		:: config == LATE -> life[1] = ALIVE; task[1] = 1; tasks = 2; run Thread(1)
		:: config == EXEMPT -> life[1] = ALIVE; task[1] = 1; tasks = 2; own[1] = 1; run Other(1)
		:: else
		fi
	};
	atomic { over && _nr_pr == 1 -> W(W_END) }
}
