//! What a container writes is on the host when its end is known, however it was written.

use anyhow::{Result, ensure};
use e2e::{Runtime, compile::compile, with_node};
use std::fs;

/// Writes 4 MiB through a memory map and ends without another word to the kernel: by itself, or by a signal.
const MAPPER: &str = r"
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
enum { SIZE = 4 << 20 };
int main(int argc, char **argv) {
    if (argc > 2) {
        /* the first process of a container is not killed by its own signals */
        pid_t child = fork();
        if (child) return waitpid(child, 0, 0) < 0;
    }
    int file = open(argv[1], O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, SIZE)) return 1;
    char *map = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return 2;
    memset(map, 'k', SIZE);
    if (argc > 2) kill(getpid(), SIGKILL);
    _exit(0);
}
";

#[test]
fn mapped_memory_reaches_the_host() -> Result<()> {
    with_node(|node| {
        let shared = node.dir().join("shared");
        fs::create_dir(&shared)?;
        fs::write(shared.join("mapper"), compile(node.dir(), "mapper", MAPPER)?)?;
        let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", shared.display());
        for (name, more) in [("exits", ""), ("killed", "killed")] {
            let script = format!("cp /shared/mapper /tmp/m && chmod 700 /tmp/m && /tmp/m /shared/{name} {more}");
            node.run(Runtime::Kata, name, &["--mount", &mount], &["sh", "-c", &script]).output()?.ok()?;
            let written = fs::read(shared.join(name))?;
            let wrong = written.iter().position(|byte| *byte != b'k');
            ensure!(
                written.len() == 4 << 20 && wrong.is_none(),
                "{name}: of {} bytes wrong at {wrong:?}",
                written.len()
            );
        }
        Ok(())
    })
}
