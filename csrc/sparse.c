/* SPDX-License-Identifier: MIT */
/*
 * DOC: Sparse tables
 *
 * The tables that processes share are large and nearly empty: what nobody touched takes no memory. The kernel accounts a page
 * of a memory file when it is touched for the first time, be it only read, and where it must not promise more than it has
 * (vm.overcommit_memory=2) and nothing is left, a touch ends in SIGBUS. So pages are asked for first, one by one, by a
 * call that returns an error. What is known to be there is remembered, in private memory: then a look at a byte is all.
 *
 * SPARSE-1. No word of a sparse table is read or written by this process unless its page is in the book, was made sure of
 *           when the memory was mapped (the header, the chunks), or is there as the kernel says (SEEK_DATA). Bitmaps
 *           have no book: see REFS-8.
 * SPARSE-2. The book says what is so for ever: pages of these files are never given back, by whoever made them. A process
 *           that dies after it asked for a page and before it used it leaves a page of zeros: the same table as before.
 * SPARSE-3. Only this process writes its book. What a confused peer writes over the tables makes us ask for pages in vain,
 *           and never touch one that is not there.
 *
 * A page that cannot be had is a miss for those who look something up, and -ENOMEM for those who need it; the book keeps the
 * error for the scanner to report. Nothing is lost meanwhile, and the next pass tries again.
 *
 * Any thread may call; the book only gains bits. The child of a fork inherits it with the mappings it is about.
 */
#include "sparse.h"

#include "os.h"

int ksm_sparse_populate(const struct ksm_sparse *sparse, uint64_t page)
{
	int r = ksm_os_populate(sparse->base + (page << KSM_PAGE_SHIFT), KSM_PAGE_SIZE);
	if (r)
		ksm_store_relaxed(&sparse->book->error, r);
	else
		ksm_or_release(ksm_sparse_byte(sparse, page), (uint8_t)(1u << sparse->table));
	return r;
}
