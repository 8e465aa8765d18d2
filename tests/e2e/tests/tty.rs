//! A shell on a terminal, driven as a person would, with the product and with runc.

use anyhow::{Result, ensure};
use e2e::{BOTH, Node, Runtime, image, node::NAMESPACE, pty::Terminal, with_every_containerd, with_node};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);

fn terminal(node: &Node, args: &[&str]) -> Result<Terminal> {
    let all: Vec<String> =
        [&["-a", &node.address(), "-n", NAMESPACE], args].concat().into_iter().map(str::to_owned).collect();
    Terminal::start(&node.programs().ctr, &all, 24, 80)
}

fn shell(node: &Node, runtime: Runtime) -> Result<Terminal> {
    let id = format!("{}-tty", runtime.tag());
    let run = ["run", "--rm", "-t", "--runtime", runtime.name(), "--env", "PS1=ready> ", image::NAME, &id, "sh"];
    let mut shell = terminal(node, &run)?;
    // the prompt is followed by a question for the cursor's place in some shells; only the words count
    shell.expect("ready> ", SOON)?;
    Ok(shell)
}

#[test]
fn a_shell_on_a_terminal() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let mut shell = shell(node, runtime)?;
            shell.send("test -t 0 && test -t 1 && test -t 2 && echo is-a-$((40 + 2))-tty\r")?;
            shell.expect("is-a-42-tty\n", SOON)?;
            shell.expect("ready> ", SOON)?;
            shell.send("exit 42\r")?;
            let (code, shown) = shell.finish(SOON)?;
            ensure!(code == 42, "{runtime:?}: exit code {code} instead of 42; shown {shown:?}");
        }
        Ok(())
    })
}

#[test]
fn lines_can_be_edited() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let mut shell = shell(node, runtime)?;
            // typed wrong, mended with backspace, cursor-left and a letter put in
            shell.send("echo rigXX\x7f\x7ft\x1b[Dh-$((1 + 1))")?;
            shell.send("\x1b[C\r")?;
            shell.expect("\n", SOON)?;
            shell.expect("righ-2t\n", SOON)?;
            // and the line before comes back
            shell.send("\x1b[A\r")?;
            shell.expect("righ-2t\n", SOON)?;
            shell.expect("ready> ", SOON)?;
            // without the shell's own editor, the terminal of the container edits by itself
            shell.send("sh -c 'echo be''gun; exec cat'\r")?;
            shell.expect("begun\n", SOON)?;
            shell.send("abX\x7fc\r")?;
            shell.expect("abc\n", SOON)?;
            shell.send("\x04")?;
            shell.expect("ready> ", SOON)?;
            shell.send("exit\r")?;
            let (code, _) = shell.finish(SOON)?;
            ensure!(code == 0, "{runtime:?}: exit code {code}");
        }
        Ok(())
    })
}

#[test]
fn control_c_interrupts() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let mut shell = shell(node, runtime)?;
            shell.send("sh -c 'echo be''gun; exec sleep 1000'\r")?;
            shell.expect("begun\n", SOON)?;
            shell.send("\x03")?;
            shell.expect("ready> ", SOON)?;
            shell.send("echo was-$?\r")?;
            shell.expect("was-130\n", SOON)?;
            shell.send("exit 3\r")?;
            let (code, _) = shell.finish(SOON)?;
            ensure!(code == 3, "{runtime:?}: exit code {code}");
        }
        Ok(())
    })
}

#[test]
fn resizes_are_seen() -> Result<()> {
    with_node(|node| {
        for runtime in BOTH {
            let mut shell = shell(node, runtime)?;
            shell.send("stty size\r")?;
            shell.expect("24 80\n", SOON)?;
            shell.expect("ready> ", SOON)?;
            // the interactive shell keeps SIGWINCH for its line editor, so that another one has to tell of it
            let script = "trap 'echo resized-to-$(stty size); exit' WINCH; echo be''gun; while :; do sleep 0.05; done";
            shell.send(&format!("sh -c \"{}\"\r", script.replace('$', "\\$")))?;
            shell.expect("begun\n", SOON)?;
            shell.resize(50, 132)?;
            shell.expect("resized-to-50 132\n", SOON)?;
            shell.expect("ready> ", SOON)?;
            shell.send("exit\r")?;
            shell.finish(SOON)?;
        }
        Ok(())
    })
}

#[test]
fn exec_with_a_terminal() -> Result<()> {
    with_every_containerd(|node| {
        for runtime in BOTH {
            let id = format!("{}-exec", runtime.tag());
            node.detached(runtime, &id, &[], &["sleep", "1000"])?;
            let mut shell = terminal(node, &["task", "exec", "-t", "--exec-id", "sh", &id, "sh"])?;
            shell.expect("# ", SOON)?;
            shell.send("stty size; test -t 0 && echo tty-$((1 + 1))\r")?;
            shell.expect("24 80\n", SOON)?;
            shell.expect("tty-2\n", SOON)?;
            shell.send("while [ \"$(stty size)\" != '30 99' ]; do sleep 0.02; done; echo now-$((1 + 2))\r")?;
            // ctr looks at its window's size only from some time after the shell's first output on
            for left in (0..5).rev() {
                shell.resize(30, 100)?;
                shell.resize(30, 99)?;
                match shell.expect("now-3\n", Duration::from_secs(2)) {
                    Err(error) if left == 0 => return Err(error),
                    Err(_) => {}
                    Ok(_) => break,
                }
            }
            shell.send("exit 7\r")?;
            let (code, _) = shell.finish(SOON)?;
            ensure!(code == 7, "{runtime:?}: exit code {code} instead of 7");
            node.remove(&id)?;
        }
        Ok(())
    })
}
