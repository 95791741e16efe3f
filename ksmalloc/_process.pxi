# SPDX-License-Identifier: MIT
# A part of _core.pyx: what there is once in a process. The core may be linked into one module only.
from ksmalloc import forking

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*call)(void *) noexcept, void *arg) nogil
    int Py_AtExit(void (*function)() noexcept)
    int Py_IsInitialized() nogil


# ---- signals

def stop_signal(int number):
    """Hold threads with this real-time signal, from the next join on; 0: the core chooses."""
    check(c.ksm_process_stop_signal(number), "signal {}", (number,))


def handler_reinstall():
    check(c.ksm_process_handler_reinstall(), "the SIGSEGV handler")


def handler_popped():
    c.ksm_process_handler_popped()


cdef void stand_again() noexcept:
    c.ksm_process_handler_reinstall()


def handler_outlives_python():
    """Python's own end removes faulthandler's handler, and with it any that was installed later."""
    Py_AtExit(stand_again)


# ---- threads

cdef int resume(void *unused) noexcept:
    """Runs in the main thread, with the GIL, between two bytecodes; inside os.fork() it tries again later."""
    if forking.is_under_way():
        return Py_AddPendingCall(resume, NULL)
    with nogil:
        c.ksm_process_resume()
    return 0


cdef void wanted() noexcept nogil:
    """Only takes note: called from any thread, and inside the parent's fork handler."""
    if Py_IsInitialized():
        Py_AddPendingCall(resume, NULL)


check(c.ksm_process_check(), "ksmalloc")
c.ksm_process_on_wanted(wanted)
os.register_at_fork(after_in_child=wanted)
