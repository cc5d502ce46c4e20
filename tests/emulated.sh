#!/bin/bash
# Runs the tests of the C++ core in Bochs, a PC emulator, on a CPU whose instructions this machine lacks (DEVELOPERS.md).
#
#   tests/emulated.sh KERNEL MODEL [TEST...]
#
# KERNEL   a vmlinuz that has serial console, initial ramdisk and devtmpfs built in. Linux 6.12 of Debian 13 works; 6.1 of
#          Debian 12 hangs in Bochs 3.0. To have one without installing it:
#          apt-get download linux-image-6.12.NN+deb13-cloud-amd64 && dpkg -x linux-image-*.deb FOLDER
# MODEL    a CPU out of `bochs --help cpu`
# TEST     parts of names of tests, each run by itself; all tests if there is none
#
# Needs g++, cmake and, of Debian 13: bochs bochs-term bochsbios isolinux syslinux-common genisoimage cpio busybox-static. Where
# they are elsewhere: BOCHS, BOCHS_SHARE, VGABIOS, ISOLINUX, SYSLINUX, BUSYBOX; DISPLAY_LIBRARY=nogui for a Bochs built with that.
# It downloads and installs nothing, and writes to build/emulated alone.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,/^$/s/^# \?//p' "$0"; exit 2; }
kernel=$(realpath "$1") model=$2
shift 2
cd "$(dirname "$0")/.."
bochs=${BOCHS:-bochs}
share=${BOCHS_SHARE:-/usr/share/bochs}
isolinux=${ISOLINUX:-/usr/lib/ISOLINUX/isolinux.bin}
modules=${SYSLINUX:-/usr/lib/syslinux/modules/bios}
busybox=${BUSYBOX:-/bin/busybox}

build=build/emulated
run=$build/$model
cmake -S . -B $build/core -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXE_LINKER_FLAGS=-static
cmake --build $build/core
rm -rf "$run"
mkdir -p "$run"/{root,disk/isolinux}

# what the emulated machine starts: the tests, their words on its serial line
cp "$busybox" $build/core/core_tests "$run/root"
mkdir "$run"/root/{proc,dev}
cat > "$run/root/init" << END
#!/busybox sh
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
exec > /dev/ttyS0 2>&1
failed=0
for test in ${*:-''}; do /core_tests \$test || failed=1; done
echo "emulated: \$failed"
/busybox sleep 1 # until the line has taken all
/busybox poweroff -f
END
chmod +x "$run/root/init"
(cd "$run/root" && find . | cpio --quiet -o -H newc) > "$run/disk/initrd"

cp "$kernel" "$run/disk/vmlinuz"
cp "$isolinux" "$modules/ldlinux.c32" "$run/disk/isolinux"
cat > "$run/disk/isolinux/isolinux.cfg" << END
DEFAULT linux
LABEL linux
  KERNEL /vmlinuz
  APPEND initrd=/initrd console=ttyS0,115200 quiet loglevel=0 nokaslr nopti mitigations=off random.trust_cpu=on panic=-1
END
genisoimage -quiet -R -o "$run/disk.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$run/disk"

# Time goes by instructions, as if each took a nanosecond, and stands for nobody who waits.
cat > "$run/bochsrc" << END
config_interface: textconfig
display_library: ${DISPLAY_LIBRARY:-term}
cpu: model=$model, ips=1000000000, ignore_bad_msrs=1, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=$share/BIOS-bochs-latest, options=fastboot
vgaromimage: file=${VGABIOS:-$share/VGABIOS-lgpl-latest}
vga: extension=none, update_freq=1, realtime=0
ata0-master: type=cdrom, path=$run/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$run/serial.txt
clock: sync=none
log: $run/bochs.log
panic: action=fatal
END
touch "$run/serial.txt"
tail -f "$run/serial.txt" &
trap "kill $!" EXIT
# a terminal of its own, which the one of bochs-term draws on
TERM=xterm script -qefc "$bochs -q -f $run/bochsrc" /dev/null < /dev/null > "$run/screen.txt" || true
grep -q '^emulated: 0' "$run/serial.txt"
