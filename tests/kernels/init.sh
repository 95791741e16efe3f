#!/bin/sh
# The first process of a machine that runs tests and then switches itself off.
# /jobs has a name, seconds and a command a line.
export PATH=/bin:/usr/bin:/sbin HOME=/root TMPDIR=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mkdir -p -m 1777 /tmp /var/tmp
ip link set lo up
ulimit -c 0
. /settings
echo "=== start $(uname -r) $(nproc) processors"
while IFS='	' read -r name seconds command; do
	start=$(cut -d' ' -f1 /proc/uptime)
	echo "=== job $name begins at $start"
	dmesg -c >/dev/null
	timeout -s KILL "$seconds" sh -c "$command" </dev/null >/tmp/out 2>&1
	status=$?
	[ $status = 0 ] || dmesg | tail -n 40
	grep -v '^ok ' /tmp/out
	end=$(cut -d' ' -f1 /proc/uptime)
	echo "=== job $name status $status from $start to $end"
done </jobs
echo "=== end"
poweroff -f
