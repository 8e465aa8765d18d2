//! Which mounts of a root file system the shim does itself, where containerd 2.3 and later would do them on the host: an
//! image file then becomes a disk of the VM instead of a loop device.

use containerd_shim_protos::bootstrap_api::{BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// File systems.
const TYPES: [&str; 1] = ["erofs"];
/// What comes before a file system's name in a mount's type. `mkfs` stays containerd's.
const TRANSFORMS: [&str; 2] = ["format", "mkdir"];

/// For containerd 2.3, which reads it from what the shim says of itself.
pub(crate) const ANNOTATION: &str = "containerd.io/runtime-allow-mounts";
/// The message that 2.4 looks for.
const MESSAGE: &str = "type.googleapis.com/containerd.types.MountCapabilities";
/// `BootstrapResult.extensions`, which our version of its description has not yet.
const EXTENSIONS: u32 = 6;

/// The annotation's value.
pub(crate) fn annotation() -> String {
    let transforms = TRANSFORMS.iter().map(|name| format!("{name}/*"));
    TYPES.iter().map(ToString::to_string).chain(transforms).collect::<Vec<_>>().join(",")
}

/// Adds it to the answer of `start`.
pub(crate) fn add(result: &mut BootstrapResult) -> containerd_shim_protos::protobuf::Result<()> {
    let extension = Extension {
        value: MessageField::some(Any { type_url: MESSAGE.into(), value: message(), ..Default::default() }),
        ..Default::default()
    };
    result.special_fields.mut_unknown_fields().add_length_delimited(EXTENSIONS, extension.write_to_bytes()?);
    Ok(())
}

/// `MountCapabilities`: two lists of strings, numbers 1 and 2.
fn message() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, names) in [(1u8, TYPES.as_slice()), (2, TRANSFORMS.as_slice())] {
        for name in names {
            // a string's tag, then its length, which is below 128
            bytes.extend([number << 3 | 2, name.len() as u8]);
            bytes.extend(name.as_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_it_in_the_answer() {
        let mut result = BootstrapResult { version: 3, ..Default::default() };
        add(&mut result).expect("encoded");
        let again = BootstrapResult::parse_from_bytes(&result.write_to_bytes().expect("encoded")).expect("decoded");
        let fields: Vec<_> = again.special_fields.unknown_fields().iter().collect();
        let [(6, containerd_shim_protos::protobuf::UnknownValueRef::LengthDelimited(bytes))] = fields.as_slice() else {
            panic!("{fields:?}")
        };
        let extension = Extension::parse_from_bytes(bytes).expect("decoded");
        assert_eq!(extension.value.type_url, MESSAGE);
        assert_eq!(extension.value.value, b"\x0a\x05erofs\x12\x06format\x12\x05mkdir");
        assert_eq!(annotation(), "erofs,format/*,mkdir/*");
    }
}
