//! The journal's file: steps are added at any time, and struck out when what they stand for went before the rest.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Step;

/// The list of a run folder. Clones are the same list: what comes and goes while a pod runs is written down by whoever
/// makes it.
#[derive(Debug, Clone)]
pub struct Journal(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    path: PathBuf,
    /// `None` once the list is being undone: nothing may be made any more.
    file: Option<File>,
    steps: Vec<Step>,
}

impl Journal {
    pub(super) fn open(path: PathBuf) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path)?;
        Ok(Self(Arc::new(Mutex::new(Written { path, file: Some(file), steps: Vec::new() }))))
    }

    /// Writes a step down, as [`RunDir::push`].
    ///
    /// # Errors
    /// As there; or the sandbox is being ended.
    pub fn push(&self, step: Step) -> io::Result<()> {
        let mut written = self.lock();
        if written.file.is_some() && written.steps.contains(&step) {
            // undone once as well as twice; a container that dies and is made again must not fill the file
            return Ok(());
        }
        let file = written.file.as_mut().ok_or_else(|| io::Error::other("the sandbox is being stopped"))?;
        file.write_all(&line(&step)?)?;
        written.steps.push(step);
        Ok(())
    }

    /// Undoes one step before the others, and strikes it out. May block.
    ///
    /// # Errors
    /// It could not be undone, and stays written; or the journal cannot be written.
    pub fn take_back(&self, step: &Step) -> io::Result<()> {
        step.undo()?;
        let mut written = self.lock();
        // an end that has begun meanwhile undoes it once more, which does nothing
        if written.file.is_none() {
            return Ok(());
        }
        if let Some(place) = written.steps.iter().rposition(|one| one == step) {
            written.steps.remove(place);
        }
        // a pod may live for years: what is long gone must not fill the file
        let draft = written.path.with_extension("new");
        let mut file = File::create(&draft)?;
        for step in &written.steps {
            file.write_all(&line(step)?)?;
        }
        fs::rename(&draft, &written.path)?;
        written.file = Some(file);
        Ok(())
    }

    /// Whether the end of what it is of has begun.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().file.is_none()
    }

    /// Undoes all steps; the list takes no more, and keeps those that could not be undone. May block.
    pub(super) fn undo(&self) -> io::Result<()> {
        let steps = {
            let mut written = self.lock();
            written.file = None;
            written.steps.clone()
        };
        let (outcome, left) = match super::undo_all(&steps) {
            Ok(()) => (Ok(()), Vec::new()),
            Err((error, left)) => (Err(error), left),
        };
        self.lock().steps = left;
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(step: &Step) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(step)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::RunDir;
    use super::*;

    #[test]
    fn what_is_taken_back_is_forgotten() {
        let root = tempfile::tempdir().expect("a folder");
        let dir = RunDir::create(&root.path().join("ns@c1"), Path::new("/bundle")).expect("made");
        let (journal, path) = (dir.journal(), dir.path().to_owned());
        let steps = ["a", "b", "c"].map(|name| Step::Staging(path.join(name)));
        for step in &steps {
            journal.push(step.clone()).expect("written");
        }
        fs::create_dir(path.join("b")).expect("made");
        journal.take_back(&steps[1]).expect("undone");
        assert!(!path.join("b").exists());
        journal.push(steps[1].clone()).expect("written");
        journal.take_back(&steps[0]).expect("undone");
        let read: Vec<Step> = fs::read_to_string(path.join("journal"))
            .expect("read")
            .lines()
            .map(|line| serde_json::from_str(line).expect("a step"))
            .collect();
        assert_eq!(read, [steps[2].clone(), steps[1].clone()]);
        dir.undo().expect("undone");
        journal.push(steps[0].clone()).expect_err("it has ended");
        journal.take_back(&steps[1]).expect("nothing to do");
        assert!(!path.exists());
    }
}
