"""Checks every byte of a zip file written by torch.save, before it is read.

torch.load does not compare the file's checksums, so it would accept a flipped bit in a weight. Here
every byte must agree with the central directory or be covered by a checksum: a file that was
changed anywhere is refused.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_WRITERS64 = ((0x031E, 45), (45, 45))  # versions in the zip64 end record: miniz (torch), Python
_HAS_DESCRIPTOR = 0x0008
_PADDING, _ZIP64 = 0x4246, 0x0001  # extra fields: "FB" is torch's alignment
_CHUNK = 1 << 24

# What torch.save puts beside the storages.
_MEMBER = re.compile(r"(data\.pkl|byteorder|version|\.\w+(/\w+)?|data/\d+)$")


class DamagedZip(Exception):
    """The file is not as it was written; the message says where."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise DamagedZip(what)


def check_zip(path: Path) -> None:
    """Checks a file.

    Raises:
        DamagedZip: a byte is not as torch.save wrote it.
        Exception: any error of `zipfile` and `struct`, for a broken directory.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda m: m.header_offset)
        _check_names([m.filename for m in members])
        # One writer gives all members the same values in the fields that have no other copy.
        shared = {
            (m.create_system, m.create_version, m.external_attr, m.internal_attr, m.reserved)
            for m in members
        }
        _require(len(shared) == 1, "its directory is inconsistent")
        position = 0
        for member in members:
            _require(member.header_offset == position, f"bytes before {member.filename}")
            position = _check_member(file, member)
        _require(position == archive.start_dir, "bytes before its directory")
        _check_end(file, archive, members)


def _check_names(names: list[str]) -> None:
    """All members are in one folder, and are those that torch.save writes."""
    _require(len(set(names)) == len(names), "a member occurs twice")
    folder = names[0].split("/")[0] if names else ""
    for name in names:
        inside = name.removeprefix(f"{folder}/")
        _require(inside != name and bool(_MEMBER.match(inside)), f"unexpected member {name!r}")
    _require(f"{folder}/data.pkl" in names, "it has no data.pkl")


def _check_member(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Checks a member's header, padding, data and descriptor; returns where it ends."""
    name = member.filename
    _require(member.compress_type == zipfile.ZIP_STORED, f"{name} is compressed")
    file.seek(member.header_offset)
    header = _LOCAL.unpack(file.read(_LOCAL.size))
    magic, version, flags, method, time, date, crc, packed, size, name_size, extra_size = header
    year, month, day = member.date_time[:3]
    same = (
        magic == b"PK\x03\x04"
        and file.read(name_size) == name.encode()
        and (version, flags, method) == (member.extract_version, member.flag_bits, 0)
        and (time, date) == (_dos_time(member), (year - 1980) << 9 | month << 5 | day)
        and member.compress_size == member.file_size
    )
    _require(same, f"the header of {name}")
    _check_extra(file.read(extra_size), member)
    described = flags & _HAS_DESCRIPTOR
    sizes, big = (crc, packed, size), 0xFFFFFFFF
    expected = (member.CRC, member.file_size, member.file_size)
    known = {expected, (member.CRC, big, big)}
    known |= {(0, 0, 0), (0, big, big)} if described else set()
    _require(sizes in known, f"the sizes of {name}")
    left, sum_ = member.file_size, 0
    while left:
        chunk = file.read(min(left, _CHUNK))
        _require(bool(chunk), f"the end of {name} is missing")
        sum_, left = zlib.crc32(chunk, sum_), left - len(chunk)
    _require(sum_ == member.CRC, f"the checksum of {name}")
    if described:
        wide = member.file_size >= big or (packed, size) == (big, big)
        layout = struct.Struct("<4sLQQ" if wide else "<4sLLL")
        found = layout.unpack(file.read(layout.size))
        _require(found == (b"PK\x07\x08", *expected), f"the descriptor of {name}")
    return file.tell()


def _dos_time(member: zipfile.ZipInfo) -> int:
    """The time of day as the directory has it, in steps of two seconds."""
    hour, minute, second = member.date_time[3:]
    return hour << 11 | minute << 5 | second // 2


def _check_extra(extra: bytes, member: zipfile.ZipInfo) -> None:
    """The extra fields hold nothing but padding and the sizes."""
    wrong = f"the padding of {member.filename}"
    while extra:
        _require(len(extra) >= 4, wrong)
        kind, size = struct.unpack("<2H", extra[:4])
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        _require(len(body) == size, wrong)
        if kind == _PADDING:
            _require(body == b"Z" * size, wrong)
        else:
            _require(kind == _ZIP64 and size == 16, wrong)
            _require(struct.unpack("<2Q", body) in {(member.file_size,) * 2, (0, 0)}, wrong)


def _check_end(file: BinaryIO, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """The central directory is complete, and what follows it is what a writer puts there."""
    start, count = archive.start_dir, len(members)
    file.seek(start)
    for member in archive.infolist():
        lengths_and_disk = _CENTRAL.unpack(file.read(_CENTRAL.size))[10:14]
        name, extra = member.filename.encode(), member.extra
        _require(
            lengths_and_disk == (len(name), len(extra), 0, 0), f"the entry of {member.filename}"
        )
        file.seek(len(name) + len(extra), 1)
    size = file.tell() - start
    tail = file.read(_END64.size + _LOCATOR64.size + _END.size + 1)
    # Numbers that do not fit are all ones here, and in the zip64 record.
    count16, size32, start32 = min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
    end = (b"PK\x05\x06", 0, 0, count16, count16, size32, start32, 0)
    allowed = {_END.pack(*end)}
    for writer in _WRITERS64:
        wide = _END64.pack(b"PK\x06\x06", 44, *writer, 0, 0, count, count, size, start)
        locator = _LOCATOR64.pack(b"PK\x06\x07", 0, start + size, 1)
        allowed.add(wide + locator + _END.pack(*end))
    _require(tail in allowed, "its end")
