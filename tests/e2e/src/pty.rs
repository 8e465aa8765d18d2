//! A program on a pseudo-terminal, driven as a person would.
#![allow(unsafe_code, reason = "becoming the leader of a session and setting a window's size are system calls")]

use anyhow::{Context as _, Result, bail};
use nix::{libc, pty::Winsize};
use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

/// The program and our end of its terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    output: Receiver<Vec<u8>>,
    /// What has come and was not yet asked for.
    pending: String,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// Starts `program` as the leader of a session on a new terminal of this size.
    pub fn start(program: &str, args: &[String], rows: u16, columns: u16) -> Result<Self> {
        let pty = nix::pty::openpty(Some(&size(rows, columns)), None)?;
        let slave: OwnedFd = pty.slave;
        let mut command = Command::new(program);
        command.args(args).stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        // SAFETY: setsid and ioctl are async-signal-safe, and descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().with_context(|| format!("starting {program}"))?;
        drop(command);
        let master = File::from(pty.master);
        let mut reader = master.try_clone()?;
        let (tell, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // ends with an error when the last process has closed the terminal
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 || tell.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, master, output, pending: String::new() })
    }

    /// Types.
    pub fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Carriage returns are left out: `ctr` and the container's terminal both add one to the end of a line.
    fn show(&mut self, more: &[u8]) {
        self.pending.extend(String::from_utf8_lossy(more).chars().filter(|c| *c != '\r'));
    }

    /// Waits until `text` has been shown, and returns everything up to and with it.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.pending.find(text) {
                let rest = self.pending.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.pending, rest));
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(more) => self.show(&more),
                Err(_) => bail!("the terminal did not show {text:?} within {limit:?}, but {:?}", self.pending),
            }
        }
    }

    /// Gives the window another size, which tells the program in it.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = size(rows, columns);
        // SAFETY: the argument is a whole winsize that outlives the call.
        match unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()).context("setting the window's size"),
        }
    }

    /// Waits for the program's end and returns its exit code and what was still shown.
    pub fn finish(mut self, limit: Duration) -> Result<(i32, String)> {
        let end = Instant::now() + limit;
        loop {
            // the channel closes when the terminal does, which is when the program has gone
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(more) => self.show(&more),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    bail!("not ended within {limit:?}; shown: {:?}", self.pending);
                }
            }
        }
        let status = self.child.wait()?;
        Ok((status.code().unwrap_or(-1), self.pending.clone()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
