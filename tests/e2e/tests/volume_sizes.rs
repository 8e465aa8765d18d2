//! Large and many: a sparse file of 50 GiB, and as many small files as `KATA_SMALL_FILES` says.

use anyhow::{Result, ensure};
use e2e::{Runtime, compile::compile, with_node};
use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

/// In `make test`: 200,000 take minutes without KVM, and a daemon that may have so many files open (`ulimit -Hn`).
const FILES: u32 = 4000;

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

#[test]
fn a_large_file_and_many_small_ones() -> Result<()> {
    let files = std::env::var("KATA_SMALL_FILES").ok().map_or(Ok(FILES), |text| text.parse())?;
    with_node(|node| {
        let volume = node.dir().join("sizes");
        fs::create_dir(&volume)?;
        fs::write(volume.join("program"), compile(node.dir(), "measure", PROGRAM)?)?;
        let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", volume.display());
        let script = format!("cp /data/program /bin/p && chmod 755 /bin/p && p /data {files}");
        let out = node
            .run(Runtime::Kata, "sizes", &["--mount", &mount], &["sh", "-c", &script])
            .limit(Duration::from_secs(1800))
            .output()?
            .ok()?;
        println!("{files} files: {:?}", out.took);
        ensure!(out.text() == format!("made\nlisted {files}\nremoved {files}"), "{}", out.text());
        let meta = fs::metadata(volume.join("sparse"))?;
        ensure!(meta.len() == 50 << 30 && meta.blocks() < 1000, "{} bytes, {} blocks", meta.len(), meta.blocks());
        ensure!(!volume.join("many").exists(), "the folder is still there");
        Ok(())
    })
}
