#!/bin/sh
# Runs in an initramfs of dracut without systemd, after the disk is mounted.

if getarg composefs= > /dev/null || getarg composefs.digest= > /dev/null; then
    modprobe -a erofs overlay loop
    sealmount-setup-root --sysroot "$NEWROOT" || die "sealmount: no root file system"
fi
