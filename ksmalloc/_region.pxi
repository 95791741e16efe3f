# SPDX-License-Identifier: MIT
# A part of _core.pyx: memory that somebody else allocated.

@cython.final
@cython.no_gc_clear
cdef class Region:
    """Memory that somebody else allocated, registered; holds an export of its buffer meanwhile."""

    cdef Domain domain
    cdef c.ksm_region *region
    cdef Py_buffer view
    cdef bint exported
    cdef readonly size_t pages

    def __cinit__(self, Domain domain not None, buffer):
        py.PyObject_GetBuffer(buffer, &self.view, py.PyBUF_STRIDES)
        self.exported = True
        if self.view.readonly:
            raise BufferError("a read-only buffer cannot be registered")
        if not py.PyBuffer_IsContiguous(&self.view, b"A"):
            raise BufferError("a buffer that is not contiguous cannot be registered")
        self.domain = domain
        with nogil:
            rc = c.ksm_region_register(domain.domain, self.view.buf, self.view.len, &self.region, &self.pages)
        check(rc, "a buffer of {} bytes at {:#x}", (self.nbytes, self.address))

    def __dealloc__(self):
        cdef int rc = 0
        if self.region != NULL:
            with nogil:
                rc = c.ksm_region_unregister(self.region)
        if self.exported and rc == 0:  # else the pages are still ours, and the memory must stay for ever
            py.PyBuffer_Release(&self.view)

    def unregister(self):
        cdef c.ksm_region *region = self.region
        if region == NULL:
            return
        self.region = NULL  # another thread finds nothing to do
        with nogil:
            rc = c.ksm_region_unregister(region)
        if rc < 0:
            self.region = region
        check(rc, "unregister a buffer of {} bytes", (self.nbytes,))
        self.exported = False
        py.PyBuffer_Release(&self.view)

    @property
    def registered(self):
        return self.region != NULL

    @property
    def address(self):
        return <uintptr_t>self.view.buf

    @property
    def nbytes(self):
        return self.view.len
