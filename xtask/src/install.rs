//! Puts the product below a prefix. Owns the list of installed files and their modes.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::step;
use crate::workspace::{
    COMMAND_LINE, CONFIGURATION, GUEST_FILES, IMAGE, IMAGE_CONFIGURATION, IMAGE_VERITY, INITRD, MAN_PAGE, SHIM,
    VMLINUX, VMLINUZ, Workspace,
};

/// `make install`: where PREFIX and DESTDIR say, through sudo where we may not write.
pub(crate) fn from_environment(workspace: &Workspace) -> Result<ExitCode> {
    let prefix = PathBuf::from(env::var_os("PREFIX").unwrap_or("/usr/local".into()));
    let destdir = PathBuf::from(env::var_os("DESTDIR").unwrap_or_default());
    match below(workspace, &destdir, &prefix) {
        Err(error) if is_denied(&error) && !nix::unistd::geteuid().is_root() => {
            println!("    {} belongs to root: asking sudo", under(&destdir, &prefix).display());
            let mut again = Command::new("sudo");
            again.arg("env").arg(assignment("PREFIX", &prefix)).arg(assignment("DESTDIR", &destdir));
            if let Some(target) = env::var_os("CARGO_TARGET_DIR") {
                again.arg(assignment("CARGO_TARGET_DIR", Path::new(&target)));
            }
            let failed = again.arg(env::current_exe()?).arg("install").exec();
            Err(failed).context("sudo cannot be started: run `make install` as root, or set PREFIX")
        }
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn assignment(name: &str, value: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(name);
    text.push("=");
    text.push(value);
    text
}

fn is_denied(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::PermissionDenied)
}

/// Installs below `destdir``prefix`; the configuration names `prefix` alone, as packagers need it.
pub(crate) fn below(workspace: &Workspace, destdir: &Path, prefix: &Path) -> Result<()> {
    ensure!(prefix.is_absolute(), "PREFIX={} must be an absolute path", prefix.display());
    let root = under(destdir, prefix);
    step::timed(&format!("installing below {}", root.display()), || {
        let Some(prefix) = prefix.to_str().filter(|text| !text.contains(['"', '\\', '\n'])) else {
            bail!("PREFIX={} has characters that do not fit in configuration.toml", prefix.display());
        };
        put(&root.join(SHIM), &read(&workspace.shim(), "run `make build`")?, 0o755)?;
        put(&root.join(COMMAND_LINE), &read(&workspace.command_line(), "run `make build`")?, 0o755)?;
        for name in [VMLINUZ, VMLINUX, INITRD, IMAGE] {
            let file = read(&workspace.guest_files().join(name), "run `make guest`")?;
            put(&root.join(GUEST_FILES).join(name), &file, 0o644)?;
        }
        let verity = read(&workspace.guest_files().join(IMAGE_VERITY), "run `make guest`")?;
        let verity = String::from_utf8(verity).context("the image's root hash is not UTF-8")?;
        let (initrd, image) = roots(prefix, &verity);
        put(&root.join(CONFIGURATION), configuration(prefix, &initrd).as_bytes(), 0o644)?;
        put(&root.join(IMAGE_CONFIGURATION), configuration(prefix, &image).as_bytes(), 0o644)?;
        put(&root.join(MAN_PAGE), config::render::man(prefix).as_bytes(), 0o644)
    })
}

/// The file with these settings for the guest's root; every other key is at its default.
fn configuration(prefix: &str, root: &[(&str, String)]) -> String {
    let kernel = format!("{prefix}/{GUEST_FILES}/{VMLINUX}");
    config::render::template(config::Driver::Qemu, config::render::Guest { kernel: &kernel, root })
}

/// Keys of the guest's root and their values in TOML.
type Root = Vec<(&'static str, String)>;

/// The settings of the initrd and those of the image.
fn roots(prefix: &str, verity: &str) -> (Root, Root) {
    let initrd = vec![("initrd", format!("\"{prefix}/{GUEST_FILES}/{INITRD}\""))];
    let image = vec![
        ("image", format!("\"{prefix}/{GUEST_FILES}/{IMAGE}\"")),
        ("rootfs_type", "\"erofs\"".to_owned()),
        ("kernel_verity_params", format!("\"{verity}\"")),
    ];
    (initrd, image)
}

fn under(destdir: &Path, prefix: &Path) -> PathBuf {
    let base = if destdir.as_os_str().is_empty() { Path::new("/") } else { destdir };
    base.join(prefix.strip_prefix("/").unwrap_or(prefix))
}

fn read(path: &Path, remedy: &str) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{} cannot be read: {remedy}", path.display()))
}

/// Under another name first: a shim or QEMU that runs keeps the old file, a failure leaves it whole.
fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || {
        let directory = path.parent().unwrap_or(path);
        fs::create_dir_all(directory)?;
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes)?;
        fs::set_permissions(&temporary, Permissions::from_mode(mode))?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("{} cannot be installed", path.display()))?;
    println!("    {}", path.display());
    Ok(())
}
