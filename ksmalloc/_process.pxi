# SPDX-License-Identifier: MIT
# A part of _core.pyx: what there is once in a process. The core may be linked into one module only.
from ksmalloc import forking

# The core is one for the process, and so is this module: Cython allows it in the interpreter that was first
# to ask. Let that be the main one. Whoever comes first from a subinterpreter would keep the main interpreter
# out for ever, and what outlives it (pending calls, fork handlers) would call into objects that are gone.
# Cython asks for the number of the interpreter right before it remembers it, and only then.
cdef extern from *:
    """
    static int is_main(PyInterpreterState *interpreter)
    {
        return interpreter == PyInterpreterState_Main();
    }
    static int64_t number_of_main(PyInterpreterState *interpreter)
    {
        if (is_main(interpreter))
            return PyInterpreterState_GetID(interpreter);
        PyErr_SetString(PyExc_ImportError,
                        "ksmalloc works in the main interpreter only, not in subinterpreters");
        return -1;
    }
    #define PyInterpreterState_GetID number_of_main
    """
    ctypedef struct PyInterpreterState
    int is_main(PyInterpreterState *interpreter)

cdef extern from "Python.h":
    PyInterpreterState *PyInterpreterState_Get()
    int Py_AddPendingCall(int (*call)(void *) noexcept, void *arg) nogil
    int Py_AtExit(void (*function)() noexcept)
    int Py_IsInitialized() nogil
    int PySys_AddAuditHook(int (*hook)(const char *, PyObject *, void *) noexcept, void *user) except -1


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


cdef int before_exec(const char *event, PyObject *arguments, void *unused) noexcept:
    """A thread that is held while it calls exec would die of the signal in the new program."""
    if strcmp(event, "os.exec") == 0:
        with nogil:
            c.ksm_process_before_exec()
    return 0


# ---- threads

cdef int resume(void *unused) noexcept:
    """Runs with a GIL, between two bytecodes; inside os.fork() it tries again later.

    In the main thread of the interpreter whose thread has forked, in C: a subinterpreter can do that
    (subprocess does), it may have a GIL of its own, and then must not touch the objects of this module.
    """
    if is_main(PyInterpreterState_Get()) and forking.is_under_way():
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
PySys_AddAuditHook(before_exec, NULL)
os.register_at_fork(after_in_child=wanted)
