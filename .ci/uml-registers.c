/* For user-mode Linux on a processor with more registers than its kernel knows.
 *
 * It has the host's kernel put a process's registers back (PTRACE_SETREGSET), as many as
 * Linux 6.1 had room for; newer processors have 8 KiB of matrix registers (AMX) besides,
 * and the host's kernel takes all or none.  This, loaded before libc, adds those that
 * the process has. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
	static long (*next)(int, pid_t, void *, void *);
	static char all[1 << 15] __attribute__((aligned(64)));
	struct iovec now = { all, sizeof(all) }, *known;
	void *address, *data;
	va_list rest;
	pid_t pid;

	va_start(rest, request);
	pid = va_arg(rest, pid_t);
	address = va_arg(rest, void *);
	known = data = va_arg(rest, void *);
	va_end(rest);
	if (!next)
		next = (long (*)(int, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
		if (next(PTRACE_GETREGSET, pid, address, &now))
			return -1;
		if (known->iov_len < now.iov_len) {
			memcpy(all, known->iov_base, known->iov_len);
			data = &now;
		}
	}
	return next(request, pid, address, data);
}
