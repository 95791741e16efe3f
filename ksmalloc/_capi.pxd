# SPDX-License-Identifier: MIT
# Declarations of csrc/ksmalloc.h, the facade of the core. Nothing is defined here.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t


cdef extern from "ksmalloc.h" nogil:
    enum:
        KSM_PEERS_MAX
        KSM_ARENA_NO_SCAN
        KSM_ARENA_SIGSEGV
        KSM_ALLOC_UNMERGEABLE

    struct ksm_domain:
        pass
    struct ksm_arena:
        pass
    struct ksm_region:
        pass

    const char *ksm_error_name(int code)
    const char *ksm_error_message(int code)

    # ---- domains
    enum ksm_backing:
        KSM_BACKING_MEMFD
        KSM_BACKING_SHM

    enum ksm_barrier_kind:
        KSM_BARRIER_AUTO
        KSM_BARRIER_MOVE
        KSM_BARRIER_STOP
        KSM_BARRIER_SEGV
        KSM_BARRIER_NONE

    enum ksm_tracking:
        KSM_TRACKING_NONE
        KSM_TRACKING_PAGEMAP
        KSM_TRACKING_DIGEST
        KSM_TRACKING_WRITES

    struct ksm_domain_options:
        const char *name
        const char *path
        uint64_t capacity_bytes
        int backing
        int barrier
        int store_fd
        uint8_t store_id[16]

    int ksm_domain_attach(const ksm_domain_options *options, ksm_domain **out)
    void ksm_domain_detach(ksm_domain *domain)

    struct ksm_stats:
        uint64_t pages_shared
        uint64_t pages_sharing
        uint64_t pages_unshared
        uint64_t pages_volatile
        uint64_t pages_scanned
        uint64_t pages_skipped
        uint64_t full_scans
        uint64_t ksm_zero_pages
        uint64_t pages_merged
        uint64_t merges
        uint64_t promotions
        uint64_t cow_breaks
        uint64_t put_backs
        uint64_t failures
        uint64_t give_backs
        uint64_t stops
        uint64_t suspensions
        uint64_t withheld
        uint64_t vmas_used
        uint64_t vma_budget
        uint64_t saved_bytes
        uint64_t metadata_bytes
        uint64_t store_bytes
        uint32_t peers
        uint32_t page_size
        int32_t barrier
        int32_t why_not

    int ksm_domain_stats(ksm_domain *domain, ksm_stats *out)

    struct ksm_capabilities:
        int32_t barrier
        int32_t tracking
        int32_t move
        int32_t uffd_device
        int32_t uffd_call
        int32_t uffd_user
        int32_t stop
        int32_t stop_signal
        int32_t segv
        int32_t handler
        int32_t pagemap
        int32_t writes
        int32_t dumpable
        int32_t why_not
        uint64_t stops
        uint64_t stops_failed
        uint64_t suspensions
        char stop_reason[128]  # KSM_WHY_MAX

    int ksm_domain_capabilities(ksm_domain *domain, ksm_capabilities *out)

    struct ksm_peer_info:
        int32_t pid
        uint32_t slot
        uint32_t self
        ksm_stats stats

    int ksm_domain_peers(ksm_domain *domain, ksm_peer_info *out, size_t room)
    void ksm_domain_id(ksm_domain *domain, char *out)
    const char *ksm_domain_directory(ksm_domain *domain)

    struct ksm_report:
        uint64_t pages_scanned
        uint64_t pages_merged
        uint64_t zero_pages
        uint64_t frames_written
        uint64_t passes
        double seconds
        int32_t settled
        int32_t why_not

    int ksm_domain_settle(ksm_domain *domain, uint32_t timeout_ms, int again, ksm_report *out)
    int ksm_domain_sweep(ksm_domain *domain, uint64_t *freed)

    # ---- settings
    struct ksm_settings:
        uint32_t run
        uint32_t pages_to_scan
        uint32_t max_pages_to_merge
        uint32_t sleep_millisecs
        uint32_t advisor_mode
        uint32_t advisor_max_cpu

    int ksm_settings_read(const ksm_domain_options *options, ksm_settings *out, uint32_t *peers)
    int ksm_settings_write(const ksm_domain_options *options, const ksm_settings *settings)
    int ksm_domain_clean(const ksm_domain_options *options)

    # ---- arenas
    int ksm_arena_create(ksm_domain *domain, unsigned flags, ksm_arena **out)
    void ksm_arena_close(ksm_arena *arena)
    void ksm_arena_release(ksm_arena *arena)

    struct ksm_block:
        void *address
        size_t nbytes
        void *owner

    int ksm_arena_alloc(ksm_arena *arena, size_t nbytes, unsigned flags, ksm_block *out)
    int ksm_arena_free(ksm_arena *arena, ksm_block *block)
    int ksm_arena_scan(ksm_arena *arena, ksm_report *out)
    int ksm_arena_unmerge(ksm_arena *arena, uint64_t *unmerged, uint64_t *broken)

    int ksm_arena_freeze(ksm_arena *arena, void *address, size_t nbytes, size_t *pages)
    int ksm_arena_thaw(ksm_arena *arena, void *address, size_t nbytes)
    int ksm_arena_writable_begin(ksm_arena *arena, void *address, size_t nbytes)
    int ksm_arena_writable_end(ksm_arena *arena, void *address, size_t nbytes)

    # A function of the same name exists, so the struct is named as C names it.
    ctypedef struct ksm_arena_numbers "struct ksm_arena_stats":
        uint64_t blocks
        uint64_t allocated_bytes
        uint64_t pages
        uint64_t pages_merged
        uint64_t pages_broken
        uint64_t pages_zero
        uint64_t pages_frozen
        uint64_t cow_breaks
        uint64_t scan
        uint64_t sigsegv

    int ksm_arena_stats(ksm_arena *arena, ksm_arena_numbers *out)

    # ---- registered memory
    int ksm_region_register(ksm_domain *domain, void *address, size_t nbytes, ksm_region **out, size_t *pages)
    int ksm_region_unregister(ksm_region *region)

    # ---- signals
    int ksm_process_stop_signal(int signal)
    void ksm_process_before_exec()
    int ksm_process_handler_reinstall()
    void ksm_process_handler_popped()

    # ---- the process
    void ksm_process_on_wanted(void (*wanted)() noexcept)
    void ksm_process_resume()
    int ksm_process_check()
