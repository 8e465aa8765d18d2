//! Large and many: a sparse file of 50 GiB, and as many small files as `KATA_SMALL_FILES` says, in a volume and in a root
//! file system on a disk.

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::Mount;
use e2e::{
    Node, NodeSetup, Runtime,
    compile::compile,
    ctr::Invocation,
    image,
    install::Install,
    task_api::{Bundle, Shim},
    with_node, with_node_setup,
};
use std::{fs, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

/// In `make test`: 200,000 take minutes without KVM.
const FILES: u32 = 4000;

/// Fewer files may be open in the daemon.
const OPEN: u32 = 1000;

/// For as many as somebody asks for.
const LIMIT: Duration = Duration::from_secs(1800);

/// Bytes of the sparse file.
const SPARSE: u64 = 50 << 30;

/// Writes, reads and measures a file with holes; makes, lists and removes files.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
int main(int argc, char **argv) {
    if (chdir(argv[1])) return 1;
    int count = atoi(argv[2]), file = open("sparse", O_RDWR | O_CREAT, 0600);
    for (off_t at = 0; at < 50LL << 30; at += 10LL << 30)
        if (pwrite(file, &at, sizeof at, at) != sizeof at) return 2;
    if (ftruncate(file, 50LL << 30)) return 3;
    for (off_t at = 0, found; at < 50LL << 30; at += 10LL << 30)
        if (pread(file, &found, sizeof found, at) != sizeof found || found != at) return 4;
    if (fsync(file)) return 5;
    mkdir("many", 0755);
    char name[300];
    for (int number = 0; number < count; number++) {
        snprintf(name, sizeof name, "many/file-%d", number);
        int one = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (one < 0 || write(one, name, strlen(name)) < 0 || close(one)) { perror(name); return 6; }
    }
    puts("made");
    for (int pass = 0; pass < 2; pass++) {
        DIR *folder = opendir("many");
        int listed = 0;
        struct stat stat;
        for (struct dirent *one; (one = readdir(folder));) {
            if (one->d_name[0] == '.') continue;
            snprintf(name, sizeof name, "many/%s", one->d_name);
            if (lstat(name, &stat) || !stat.st_size) return 7;
            listed++;
            if (pass && unlink(name)) return 8;
        }
        closedir(folder);
        printf("%s %d\n", pass ? "removed" : "listed", listed);
    }
    if (rmdir("many")) return 9;
}
"#;

fn files() -> Result<u32> {
    let Ok(text) = std::env::var("KATA_SMALL_FILES") else { return Ok(FILES) };
    text.parse().with_context(|| format!("KATA_SMALL_FILES={text}: not a number"))
}

/// Has them all in a volume.
fn in_a_volume(node: &Node, files: u32) -> Result<()> {
    let volume = node.dir().join("sizes");
    fs::create_dir(&volume)?;
    fs::write(volume.join("program"), compile(node.dir(), "measure", PROGRAM)?)?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", volume.display());
    let script = format!("cp /data/program /bin/p && chmod 755 /bin/p && p /data {files}");
    let run = node.run(Runtime::Kata, "sizes", &["--mount", &mount], &["sh", "-c", &script]);
    let out = run.limit(LIMIT).output()?.ok()?;
    println!("{files} files: {:?}", out.took);
    ensure!(out.text() == format!("made\nlisted {files}\nremoved {files}"), "{}", out.text());
    let meta = fs::metadata(volume.join("sparse"))?;
    ensure!(meta.len() == SPARSE && meta.blocks() < 1000, "{} bytes, {} blocks", meta.len(), meta.blocks());
    ensure!(!volume.join("many").exists(), "the folder is still there");
    Ok(())
}

#[test]
fn a_large_file_and_many_small_ones() -> Result<()> {
    let files = files()?;
    with_node(|node| in_a_volume(node, files))
}

/// The guest forgets files before its daemon has too many open; with `virtio_fs_cache = "never"` when nobody uses them.
#[test]
fn a_guest_may_have_more_files_than_its_daemon() -> Result<()> {
    let files = files()?;
    for cache in ["auto", "never"] {
        let limit = format!("--rlimit-nofile={OPEN}");
        let extra: toml::Value = vec!["--thread-pool-size=1".to_owned(), limit].into();
        let changes = [("virtio_fs_cache", cache.into()), ("virtio_fs_extra_args", extra)];
        let config = Some(Install::locate()?.config_with(&changes)?);
        with_node_setup(NodeSetup { config, ..NodeSetup::default() }, |node| in_a_volume(node, files.min(200_000)))
            .context(cache)?;
    }
    Ok(())
}

#[test]
fn a_large_file_and_many_small_ones_on_a_disk() -> Result<()> {
    let files = files()?;
    with_node(|node| {
        let (root, disk) = (node.dir().join("root"), node.dir().join("disk"));
        image::lay_out(&root)?;
        fs::write(root.join("program"), compile(node.dir(), "measure", PROGRAM)?)?;
        Invocation::new("chmod", [Path::new("755"), &root.join("program")]).output()?.ok()?;
        // a block and an inode for each
        let inodes = (files + 2000).to_string();
        fs::File::create(&disk)?.set_len((64 << 20) + u64::from(files) * 5 * 1024)?;
        let words = ["-q", "-F", "-b", "4096", "-N", &inodes, "-d"].map(Path::new);
        Invocation::new("mkfs.ext4", words.into_iter().chain([root.as_path(), &disk])).output()?.ok()?;

        let bundle = Bundle::make(node, "disk", &["/program", "/", &files.to_string()])?;
        let shim = Shim::start(node, "disk", &bundle)?;
        let rootfs = Mount {
            type_: "ext4".into(),
            source: disk.display().to_string(),
            options: vec!["rw".into(), "loop".into()],
            ..Default::default()
        };
        let status = shim.create_from("disk", vec![rootfs]).and_then(|_| {
            shim.start_container("disk")?;
            let begin = std::time::Instant::now();
            let status = shim.wait_within("disk", LIMIT)?;
            println!("{files} files on a disk: {:?}", begin.elapsed());
            shim.delete("disk")?;
            Ok(status)
        });
        shim.shut_down()?;
        ensure!(status? == 0, "the program's exit code");
        let seen = |what: &str| -> Result<String> {
            let words = [Path::new("-R"), Path::new(what), &disk];
            Ok(Invocation::new("debugfs", words).output()?.ok()?.text())
        };
        let sparse = seen("stat /sparse")?;
        ensure!(sparse.contains(&format!("Size: {SPARSE}")), "{sparse}");
        let listed = seen("ls /")?;
        ensure!(listed.contains("sparse") && !listed.contains("many"), "{listed}");
        Invocation::new("e2fsck", [Path::new("-fn"), &disk]).output()?.ok()?;
        Ok(())
    })
}
