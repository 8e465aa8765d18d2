use super::*;

fn run_dir(root: &Path) -> RunDir {
    RunDir::create(&root.join("ns@c1"), Path::new("/bundle")).expect("made")
}

#[test]
fn a_dead_shims_folder_is_cleaned_and_a_living_ones_is_not() {
    let root = tempfile::tempdir().expect("a folder");
    let mut dir = run_dir(root.path());
    let staging = dir.path().join("mounts");
    dir.push(Step::Staging(staging.clone())).expect("written");
    fs::create_dir_all(staging.join("c1/rootfs")).expect("made");
    fs::write(dir.path().join("journal-not"), "x").expect("written");
    let path = dir.path().to_owned();
    let error = clean(&path).expect_err("held");
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    assert!(staging.exists());
    drop(dir);
    clean(&path).expect("cleaned");
    assert!(!path.exists() && root.path().exists());
    clean(&path).expect("again");
}

/// Two cleaners at once; while the second waits, the first is through and a new shim has taken the place.
#[test]
fn the_second_cleaner_waits_and_leaves_a_new_owner_alone() {
    let root = tempfile::tempdir().expect("a folder");
    let path = root.path().join("ns@c1");
    fs::create_dir(&path).expect("made");
    // no process has such an id
    let dead = Owner { pid: u32::try_from(i32::MAX).expect("fits"), started: 1, bundle: "/bundle".into() };
    fs::write(path.join(OWNER), serde_json::to_vec(&dead).expect("written")).expect("written");
    let first = File::open(&path).expect("opened");
    let inode = first.metadata().expect("seen").ino();
    let first = Flock::lock(first, FlockArg::LockExclusiveNonblock).expect("locked");
    clean(&path).expect_err("who does not know that the owner is dead is told");
    let second = std::thread::spawn({
        let path = path.clone();
        move || evict(&path)
    });
    // the kernel shows who waits here and nowhere else
    let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
    while !fs::read_to_string("/proc/locks").expect("read").lines().any(waits) {
        assert!(!second.is_finished(), "{:?}", second.join());
        std::thread::yield_now();
    }
    fs::remove_dir_all(&path).expect("cleaned");
    let mut new = run_dir(root.path());
    let staging = new.path().join("mounts");
    fs::create_dir(&staging).expect("made");
    new.push(Step::Staging(staging.clone())).expect("written");
    drop(first);
    second.join().expect("joined").expect("nothing left to do");
    assert!(staging.exists(), "the new shim's");
}

/// A killed shim has its lock for as long as a thread of it waits for a file system that does not answer.
#[test]
fn a_killed_owner_that_hangs_does_not_hold_its_folder() {
    let root = tempfile::tempdir().expect("a folder");
    let dir = run_dir(root.path());
    let path = dir.path().to_owned();
    let killed = owner(&path).expect("an owner");
    assert_eq!(clean(&path).expect_err("it lives").kind(), io::ErrorKind::ResourceBusy);
    let other = Owner { pid: 1, ..killed.clone() };
    assert_eq!(clean_after(&path, Some(&other)).expect_err("another's").kind(), io::ErrorKind::ResourceBusy);
    clean_after(&path, Some(&killed)).expect("cleaned");
    assert!(!path.exists());
}

#[test]
fn what_could_not_be_undone_is_undone_by_the_next_try() {
    let root = tempfile::tempdir().expect("a folder");
    let mut dir = run_dir(root.path());
    let steps = ["mounts", "shared"].map(|name| dir.path().join(name));
    for folder in &steps {
        dir.push(Step::Staging(folder.clone())).expect("written");
        fs::create_dir(folder).expect("made");
    }
    let data = steps[0].join("data");
    fs::write(&data, "somebody's").expect("written");
    dir.undo().expect_err("not empty");
    assert!(steps[0].exists() && !steps[1].exists(), "the rest was undone");
    dir.undo().expect_err("it still is not");
    fs::remove_file(data).expect("removed");
    dir.undo().expect("undone");
    assert!(!dir.path().exists());
    dir.undo().expect("nothing is left to do");
}

/// Kernels differ in what they say of a number that is no process any more.
#[test]
fn a_process_that_is_gone_is_no_error() {
    let mut child = std::process::Command::new("true").spawn().expect("started");
    let (pid, started) = (child.id(), start_time(child.id()).unwrap_or_default());
    child.wait().expect("ended");
    kill(pid, started).expect("it is gone");
    // the number may be a thread's by now
    let (told, (stop, stopped)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let thread = std::thread::spawn(move || {
        let _ = told.0.send(nix::unistd::gettid());
        let _ = stopped.recv();
    });
    let thread_id = told.1.recv().expect("its number");
    kill(thread_id.as_raw() as u32, 1).expect("a thread is not the process that it was");
    drop(stop);
    thread.join().expect("ended");
}

#[test]
fn a_folder_that_is_reset_has_its_owner_all_the_time() {
    let root = tempfile::tempdir().expect("a folder");
    let mut dir = run_dir(root.path());
    let (path, staging) = (dir.path().to_owned(), dir.path().join("mounts"));
    dir.push(Step::Staging(staging.clone())).expect("written");
    fs::create_dir(&staging).expect("made");
    fs::write(path.join("socket"), "").expect("made");
    let held = (owner(&path), identity(fs::metadata(path.join(OWNER)).expect("there")));
    let mut dir = dir.reset().expect("undone");
    assert_eq!((owner(&path), identity(fs::metadata(path.join(OWNER)).expect("there"))), held);
    assert_eq!(held.0.expect("an owner").pid, std::process::id());
    assert_eq!(clean(&path).expect_err("held").kind(), io::ErrorKind::ResourceBusy);
    assert!(!staging.exists() && !path.join("socket").exists());
    dir.push(Step::Staging(staging)).expect("written again");
    dir.undo().expect("undone");
    assert!(!path.exists());
}

#[test]
fn data_below_staging_is_never_removed() {
    let root = tempfile::tempdir().expect("a folder");
    let mut dir = run_dir(root.path());
    let staging = dir.path().join("mounts");
    dir.push(Step::Staging(staging.clone())).expect("written");
    fs::create_dir_all(staging.join("c1")).expect("made");
    fs::write(staging.join("c1/data"), "precious").expect("written");
    dir.undo().expect_err("refused");
    assert_eq!(fs::read(staging.join("c1/data")).expect("still there"), b"precious");
}

#[test]
fn processes_are_killed_unless_the_id_was_reused() {
    let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().expect("spawned");
    let pid = child.id();
    kill(pid, start_time(pid).expect("runs") + 1).expect("passed over");
    assert!(child.try_wait().expect("waited").is_none(), "another process's start time");
    let step = Step::process(pid);
    let killer = std::thread::spawn(move || step.undo());
    child.wait().expect("waited");
    killer.join().expect("joined").expect("killed");
    Step::process(pid).undo().expect("again");
}

#[test]
fn a_cut_line_is_passed_over() {
    let root = tempfile::tempdir().expect("a folder");
    let mut dir = run_dir(root.path());
    let staging = dir.path().join("mounts");
    dir.push(Step::Staging(staging.clone())).expect("written");
    fs::create_dir_all(&staging).expect("made");
    let mut file = File::options().append(true).open(dir.path().join("journal")).expect("opened");
    file.write_all(b"{\"Mounts\": \"/et").expect("written");
    let path = dir.path().to_owned();
    drop(dir);
    clean(&path).expect("cleaned");
    assert!(!path.exists());
}
