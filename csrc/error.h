/* SPDX-License-Identifier: MIT */
/*
 * error.h: the one list of codes. A function of the core returns 0, -errno, or one of these.
 */
#ifndef KSM_ERROR_H
#define KSM_ERROR_H

/* X(symbol, value, sentence). Values never change once released: Python maps them to types. */
#define KSM_ERRORS(X)                                                                                                  \
	X(KSM_EUNSUPPORTED, -5001, "this kernel, page size or platform is not supported")                              \
	X(KSM_ELAYOUT, -5002, "the domain was made by a version of ksmalloc with another memory layout")               \
	X(KSM_EOWNER, -5003, "the rendezvous belongs to another user or is open to others")                            \
	X(KSM_ENOPEER, -5004, "the domain has living peers, but none of them answered")                                \
	X(KSM_EPEERS, -5005, "the domain has no free slot for another process")                                        \
	X(KSM_EBARRIER, -5006, "the barrier asked for does not work in this process")                                  \
	X(KSM_EBACKING, -5007, "the domain exists with another backing")                                               \
	X(KSM_ECLOSED, -5008, "the arena is closed")                                                                   \
	X(KSM_EMEMORY, -5009, "the memory is not all private, writable and anonymous")                                 \
	X(KSM_EOVERLAP, -5010, "some of these pages are registered already or belong to an arena")                     \
	X(KSM_ESMALL, -5011, "there is no whole page inside the buffer")                                               \
	X(KSM_ECORRUPT, -5012, "shared memory of the domain holds impossible values")                                  \
	X(KSM_EBUDGET, -5013, "the budget of memory mappings is spent")                                                \
	X(KSM_EDUMPABLE, -5014, "the process is not dumpable, so it shows nothing to its peers")                       \
	X(KSM_ESTOPPED, -5015, "the domain's settings say run = 0")                                                    \
	X(KSM_ELOST, -5016, "the descriptors of the domain were closed and no peer could give them again")             \
	X(KSM_EUNSTOPPABLE, -5017, "a thread of the process could not be stopped")                                     \
	X(KSM_EDEVICES, -5018, "something other than threads may write to memory: io_uring, AIO, a device, AF_XDP")    \
	X(KSM_EDISPLACED, -5019, "another SIGSEGV handler has taken the place of ours")                                \
	X(KSM_EMASKED, -5020, "a thread blocks SIGSEGV, so a store into a read-only page would kill the process")      \
	X(KSM_EUSER, -5021, "the process has changed its user and could not take its memory along")                    \
	X(KSM_EHEADROOM, -5022, "a control group of the process is near its memory limit")                             \
	X(KSM_ENOPROC, -5023, "there is no /proc, through which peers reach each other")

enum ksm_error {
#define KSM_ERROR_ENUM(symbol, value, sentence) symbol = value,
	KSM_ERRORS(KSM_ERROR_ENUM)
#undef KSM_ERROR_ENUM
};

#endif
