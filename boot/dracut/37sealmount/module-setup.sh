#!/bin/bash
# The dracut module of sealmount. `dracut --add sealmount` includes it.
# dracut calls the functions, and sets the variables that are not set here.
# shellcheck disable=SC2154

check() {
    require_binaries sealmount-setup-root || return 1
    # Only if a configuration or `--add` asks for the module.
    return 255
}

installkernel() {
    # hostonly would leave out modules that the present system does not use.
    hostonly='' instmods erofs overlay loop
}

install() {
    local image

    inst_binary sealmount-setup-root /usr/sbin/sealmount-setup-root
    # -o: the file may be missing.
    inst_multiple -o /usr/lib/composefs/setup-root-conf.toml

    # The setting sealmount_images of dracut.conf names other image files.
    for image in ${sealmount_images:-/usr/lib/sealmount/images/*}; do
        # Without a match, the pattern stays as it is.
        [[ $image != *'*' ]] || continue
        inst_simple "$image" "/usr/lib/sealmount/images/${image##*/}" || {
            derror "sealmount: cannot include the image $image"
            return 1
        }
    done

    if dracut_module_included systemd; then
        inst_multiple "$systemdsystemunitdir/sealmount-setup-root.service" || return 1
        # Without its root, the system must not continue.
        $SYSTEMCTL -q --root "$initdir" add-requires initrd-root-fs.target sealmount-setup-root.service
    else
        inst_hook pre-pivot 10 "$moddir/setup-root.sh"
    fi
}
