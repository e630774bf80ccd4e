# Prints what a deploy must know about this board, as lines of name=value.
# $1: the folder to deploy to. $2: the Python interpreter, or "" to look for one.
# $3: the Python version that is wanted, like 3.11, or "" for any from 3.10 on.

fact() { [ -z "$2" ] || printf '%s=%s\n' "$1" "$2"; }

fact system "$(uname -s)"
fact machine "$(uname -m)"

libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc=$(ldd --version 2>&1 | grep -io musl | head -n 1)
fact libc "$libc"

fact memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2>/dev/null)"

folder=$1
while [ -n "$folder" ] && [ ! -d "$folder" ]; do
    case $folder in */*) folder=${folder%/*} ;; *) folder=. ;; esac
done
fact disk_kib "$(df -Pk "${folder:-/}" 2>/dev/null | awk 'NR == 2 { print $4 }')"

jetpack=$(dpkg-query --showformat='${Version}' --show nvidia-jetpack 2>/dev/null)
fact jetpack "${jetpack%%[-+]*}"
[ ! -r /etc/nv_tegra_release ] ||
    fact l4t "$(sed -n 's/^# R\([0-9]*\) .*REVISION: \([0-9.]*\).*/\1.\2/p' /etc/nv_tegra_release)"
cuda=$(sed -n '/"cuda" /,/}/s/.*"version" *: *"\([0-9.]*\)".*/\1/p' \
    /usr/local/cuda/version.json 2>/dev/null | head -n 1)
[ -n "$cuda" ] || cuda=$(sed -n 's/^CUDA Version //p' /usr/local/cuda/version.txt 2>/dev/null)
[ -n "$cuda" ] || cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
fact cuda "$cuda"

# The first interpreter that will do, or the first there is, so that it can be named.
ask='import struct, sys, sysconfig
print("%d.%d" % sys.version_info[:2], sys.implementation.name,
      (sysconfig.get_config_var("SOABI") or "-").split("-")[1], 8 * struct.calcsize("P"), sep="|")
sys.exit(sys.version_info < (3, 10) or sys.argv[1] not in ("", "%d.%d" % sys.version_info[:2]))'
first='' found=''
set -- "$2" "$3"
for python in ${1:-python3 "python$2" python3.14 python3.13 python3.12 python3.11 python3.10}; do
    command -v "$python" >/dev/null 2>&1 || continue
    if line=$("$python" -c "$ask" "$2" 2>/dev/null); then
        found="$(command -v "$python")|$line"
        break
    fi
    [ -n "$first" ] || [ -z "$line" ] || first="$(command -v "$python")|$line"
done
IFS='|' read -r path version implementation abi bits <<END
${found:-$first}
END
fact python "$path"
fact python_version "$version"
fact python_implementation "$implementation"
fact python_abi "$abi"
fact python_bits "$bits"
