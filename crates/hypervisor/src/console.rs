//! What the guest writes on its console: the last of it is kept for error messages, all of it is logged on demand.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::Notify;

/// Kept of the guest's console, bytes. The guest is hostile: it may write for ever.
const KEPT: usize = 16 << 10;
/// Longest line that is logged whole, bytes.
const LINE: usize = 2048;
/// Lines in an error message.
const SHOWN_LINES: usize = 12;
/// Lines of a kernel that has died, which tells why in the first of them.
const DYING_LINES: usize = 48;
/// How those begin.
const DYING: [&str; 5] = ["BUG: ", "kernel BUG", "Oops: ", "general protection fault", "Kernel panic"];

/// The tail of a guest's console. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kept: Mutex<Vec<u8>>,
    spoken: Notify,
}

impl Console {
    /// Reads `stream` until its end; `log` also writes each line to the log.
    pub async fn follow(self, mut stream: UnixStream, log: bool) {
        let mut chunk = [0; 4096];
        let mut line = Line::default();
        while let Ok(count) = stream.read(&mut chunk).await {
            if count == 0 {
                break;
            }
            if log {
                line.take(&chunk[..count], |line| tracing::info!(target: "guest", "{line}"));
            }
            {
                let mut kept = self.kept();
                kept.extend_from_slice(&chunk[..count]);
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
            }
            self.0.spoken.notify_waiters();
        }
    }

    /// Resolves when the guest writes something after this call, whether it is awaited by then or not.
    pub fn spoken(&self) -> impl Future<Output = ()> + Send {
        self.0.spoken.notified()
    }

    /// Whether `words` are among the last that the guest wrote, as they are.
    pub fn said(&self, words: &str) -> bool {
        let kept = self.kept();
        kept.windows(words.len().max(1)).any(|part| part == words.as_bytes())
    }

    /// The last lines, fit for a message: control characters of the guest do not reach a terminal.
    pub fn tail(&self) -> String {
        let text = printable(&self.kept());
        let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let last = lines.len().saturating_sub(SHOWN_LINES);
        let dying = lines.iter().position(|line| DYING.iter().any(|words| line.contains(words)));
        let from = dying.unwrap_or(last).min(last);
        let until = lines.len().min(from + if from < last { DYING_LINES } else { SHOWN_LINES });
        lines[from..until].join("\n")
    }

    fn kept(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A line that arrives in pieces: a serial port gives a few bytes at a time.
#[derive(Default)]
struct Line(Vec<u8>);

impl Line {
    fn take(&mut self, bytes: &[u8], mut whole: impl FnMut(&str)) {
        for &byte in bytes {
            if byte != b'\n' {
                self.0.push(byte);
            }
            if byte == b'\n' || self.0.len() >= LINE {
                let text = printable(&self.0);
                if !text.trim().is_empty() {
                    whole(text.trim_end());
                }
                self.0.clear();
            }
        }
    }
}

fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn a_dying_kernel_is_shown_from_its_first_word() {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let console = Console::default();
        let following = tokio::spawn(console.clone().follow(theirs, false));
        let text = |n: usize| format!("line {n}\n");
        let mut said: String = (0..30).map(text).collect();
        said += "Oops: general protection fault\n";
        said.extend((100..200).map(text));
        tokio::io::AsyncWriteExt::write_all(&mut ours, said.as_bytes()).await.expect("written");
        drop(ours);
        following.await.expect("followed");
        let tail = console.tail();
        assert!(tail.starts_with("Oops: ") && tail.lines().count() == DYING_LINES, "{tail}");
    }

    use super::*;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn lines_are_put_together_and_bounded() {
        let (mut line, mut seen) = (Line::default(), Vec::new());
        for piece in ["one ", "li", "ne\r\n\r\ntwo\n", "unfini"] {
            line.take(piece.as_bytes(), |line| seen.push(line.to_owned()));
        }
        assert_eq!(seen, ["one line", "two"]);
        line.take(&vec![b'x'; LINE], |line| seen.push(line.to_owned()));
        assert_eq!(seen[2].len(), LINE);
    }

    #[tokio::test]
    async fn keeps_the_last_lines_and_no_controls() {
        let (mut guest, host) = UnixStream::pair().expect("a pair");
        let console = Console::default();
        let reader = tokio::spawn(console.clone().follow(host, false));
        for n in 0..5000 {
            guest.write_all(format!("line {n}\x1b[2J\r\n").as_bytes()).await.expect("written");
        }
        drop(guest);
        reader.await.expect("read to the end");
        let tail = console.tail();
        assert_eq!(tail.lines().count(), SHOWN_LINES);
        assert!(tail.ends_with("line 4999[2J"), "{tail}");
        assert!(console.kept().len() <= KEPT);
    }
}
