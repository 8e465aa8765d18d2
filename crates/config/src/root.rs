//! The guest's root: an initrd or an image, and what makes an image trustworthy.

use crate::Error;
use crate::checks::Set;
use crate::file::{Entry, Value};
use crate::types::{Hypervisor, Verity};
use crate::value::{one_of, refuse, text_line};

/// More blocks than any disk has; keeps products of it in 64 bits.
const MOST_BLOCKS: u64 = 1 << 40;

/// Parts of `kernel_verity_params`.
const NAMES: [&str; 5] = ["root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size"];

/// Exactly one of the two; where nothing is said, the initrd.
pub(crate) fn choose(hypervisor: &mut Hypervisor, set: &Set<'_>) -> Result<(), Error> {
    match (&hypervisor.image, set.vm("image"), set.vm("initrd")) {
        (Some(_), Some(image), Some(_)) if hypervisor.initrd.is_some() => {
            return Err(refuse(
                image,
                "a guest boots an image or an initrd, and `initrd` is set too: remove one of them",
            ));
        }
        (Some(_), ..) => {
            hypervisor.image_is_memory = is_memory(set)?;
            hypervisor.initrd = None;
        }
        (None, _, Some(initrd)) if hypervisor.initrd.is_none() => {
            return Err(refuse(initrd, "a guest needs an initrd or an image: set a path, or remove the key"));
        }
        (None, ..) => {}
    }
    match set.vm("kernel_verity_params") {
        Some(params) if hypervisor.image.is_none() && hypervisor.kernel_verity_params.is_some() => {
            Err(refuse(params, "works with `image` only, which is not set: set it too, or remove this key"))
        }
        _ => Ok(()),
    }
}

/// A disk or persistent memory, by the Go runtime's key or by the Rust runtime's; nobody who boots an initrd needs to know.
fn is_memory(set: &Set<'_>) -> Result<bool, Error> {
    let by_go = match set.vm("disable_image_nvdimm").map(|entry| &entry.value) {
        Some(Value::Bool(is_disk)) => Some(!is_disk),
        _ => None,
    };
    let Some(entry) = set.vm("vm_rootfs_driver") else { return Ok(by_go.unwrap_or(false)) };
    let by_rust = driver_is_memory(entry)?;
    match by_go.filter(|by_go| *by_go != by_rust) {
        Some(by_go) => {
            Err(refuse(entry, format!("disable_image_nvdimm = {} says the opposite: remove one of them", !by_go)))
        }
        None => Ok(by_rust),
    }
}

/// The Rust runtime's word for it.
pub(crate) fn driver_is_memory(entry: &Entry) -> Result<bool, Error> {
    one_of(entry, &[("virtio-blk-pci", false), ("virtio-pmem", true)])
}

/// `root_hash=…,salt=…,data_blocks=…,data_block_size=…,hash_block_size=…`; all of it reaches the guest's command line.
pub(crate) fn verity(entry: &Entry) -> Result<Option<Verity>, Error> {
    let text = text_line(entry)?;
    if text.is_empty() {
        return Ok(None);
    }
    let mut found = [None; 5];
    for part in text.split(',') {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let Some(place) = NAMES.iter().position(|known| *known == name.trim()) else {
            return Err(refuse(entry, format!("must be {}=… with commas between", NAMES.join("=…, "))));
        };
        if found[place].replace(value.trim()).is_some() {
            return Err(refuse(entry, format!("{} is given twice", NAMES[place])));
        }
    }
    let [root_hash, salt, blocks, data_size, hash_size] = found;
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let wrong = |what: &str| refuse(entry, format!("{what} (SHA-256, as veritysetup format prints it)"));
    let root_hash = root_hash.filter(|hash| hash.len() == 64 && is_hex(hash));
    let root_hash = root_hash.ok_or_else(|| wrong("root_hash must be 64 hexadecimal digits"))?;
    let salt = salt.filter(|salt| !salt.is_empty()).unwrap_or("-");
    if salt != "-" && !(salt.len() <= 512 && salt.len().is_multiple_of(2) && is_hex(salt)) {
        return Err(wrong("salt must be at most 256 bytes in hexadecimal digits, or -"));
    }
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
    let data_blocks = number(blocks).filter(|blocks| (1..=MOST_BLOCKS).contains(blocks));
    let data_blocks = data_blocks.ok_or_else(|| wrong("data_blocks must be a number of blocks"))?;
    // a page is the most that the guest's kernel takes
    let size = |text, name: &str| {
        let size = number(text).filter(|size| size.is_power_of_two() && (512..=4096).contains(size));
        size.ok_or_else(|| wrong(&format!("{name} must be a power of two from 512 to 4096")))
    };
    Ok(Some(Verity {
        root_hash: root_hash.to_owned(),
        salt: salt.to_owned(),
        data_blocks,
        data_block_size: size(data_size, "data_block_size")?,
        hash_block_size: size(hash_size, "hash_block_size")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Entry {
        let (key, value) = ("hypervisor.qemu.kernel_verity_params".into(), Value::Text(text.into()));
        Entry { key, value, file: "/c.toml".into(), line: 1 }
    }

    #[test]
    fn as_kata_writes_it() {
        let hash = "0a".repeat(32);
        let text = format!("root_hash={hash},salt=ff00,data_blocks=649,data_block_size=4096,hash_block_size=1024");
        let verity = verity(&entry(&text)).expect("right").expect("some");
        assert_eq!((verity.root_hash, verity.salt.as_str(), verity.data_blocks), (hash, "ff00", 649));
        assert_eq!((verity.data_block_size, verity.hash_block_size), (4096, 1024));
        assert_eq!(super::verity(&entry("")).expect("right"), None);
    }

    #[test]
    fn nothing_else_reaches_a_command_line() {
        let with = |hash: &str, rest: &str| verity(&entry(&format!("root_hash={hash},{rest}")));
        let (hash, sizes) = ("0a".repeat(32), "data_blocks=1,data_block_size=4096,hash_block_size=4096");
        with(&hash, sizes).expect("no salt");
        for (hash, rest) in [
            (hash.as_str(), "data_blocks=1"),
            (&hash, "data_blocks=0,data_block_size=4096,hash_block_size=4096"),
            (&hash, "data_blocks=1,data_block_size=8192,hash_block_size=4096"),
            (&hash, "data_blocks=1,data_block_size=4096,hash_block_size=4000"),
            (&hash, &format!("salt=abc,{sizes}")),
            (&hash, &format!("salt=x\" panic=0,{sizes}")),
            (&hash, &format!("salt=00,salt=11,{sizes}")),
            (&hash, &format!("init=/bin/sh,{sizes}")),
            (&hash[1..], sizes),
            ("", sizes),
        ] {
            with(hash, rest).expect_err(rest);
        }
    }
}
